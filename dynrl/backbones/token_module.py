"""The blocks of a user's module run on some of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynrl.backbones.forward import Stand
from dynrl.backbones.module import OfModule, Standing
from dynrl.backbones.positions import SHARES, Positions
from dynrl.backbones.rows import close
from dynrl.backbones.walk import State
from dynrl.cost import executed, macs_of
from dynrl.ops.gated_positions import Block


class TokenModule(OfModule, Positions):
    """A module of your own with blocks on tokens: action c runs a block on the share shares[c] of an input's tokens.

    The blocks of ViTs and of BERT-like encoders will do, which add places to tokens in front of their blocks. The full
    route is the module itself, with the same weights. The layers that score tokens are made here and are untrained;
    `dynrl.pretraining.pretrain` trains them with the module.

    A block may be given further tensors. Those with a row for each input are cut down to the rows that run the block,
    and all of them to the tokens that run: in each dimension, behind the first, that is as long as there are tokens.

    Args:
        module: a module that maps a tensor, or tensors by name, to outputs, see `SkipModule`; it is held, not copied,
            and put into eval mode.
        input_shape: the shape of one input, or examples; see `SkipModule`.
        blocks: the names (as in `module.named_modules()`), in running order, of blocks from tokens [n, T, d] to tokens,
            which contain their shortcut.
        family, classes, input_dtype: the same as in `SkipModule`.
        shares: the shares of the tokens, one for each choice, rising to 1.
        leading: the number of tokens in front, such as a class token, that run whenever any token does.
        mask: the name of the input [n, T] that is 0 where a token is padding, as tokenizers give it. The blocks must be
            given a mask made of it. If no input has this name, there is no padding.

    Raises:
        ValueError: a block is given no tokens, what it makes of a token depends on the token's place in the row or on
            padding, or a reason of `SkipModule`.
    """

    family = "token_module"

    def __init__(
        self,
        module: nn.Module,
        input_shape: Any,
        blocks: Sequence[str],
        family: str | None = None,
        classes: int | None = None,
        input_dtype: Any = None,
        shares: tuple[float, ...] = SHARES,
        leading: int = 1,
        mask: str = "attention_mask",
    ) -> None:
        config: dict[str, Any] = {"blocks": list(blocks), "shares": list(shares), "leading": leading, "mask": mask}
        super().__init__(module, input_shape, blocks, family, None, input_dtype, **config)
        self.leading = leading
        inputs = self._example(1)
        stand: Any
        ops, stand = executed(lambda: self._cut.enter(inputs))
        stands, fixed_macs = list[Any](), [macs_of(ops)]
        for name in blocks:
            _check_tokens(name, stand)
            stands.append(stand)
            y = stand(stand.x.detach().clone())
            ops, stand = executed(lambda: stands[-1].follow(y))  # noqa: B023 (called at once)
            fixed_macs.append(macs_of(ops))
        self._set_classes(stand, classes)
        _, tokens, width = stands[0].x.shape
        padded = self.form.named and mask in self.input_shape
        if padded:
            self._check_mask(inputs, tokens)

        def block_macs(point: int, count: int) -> int:
            x, places = stands[point].x.detach()[:, :count].clone(), torch.arange(count, device=inputs.device)
            return macs_of(executed(lambda: stands[point](x, None, places.unsqueeze(0)))[0]) if count else 0

        widths = [width] * len(stands)
        self._set_points(list(blocks), tuple(shares), tokens, widths, block_macs, fixed_macs, padded)
        self.scorers.to(stands[0].x.detach())
        self._check_routes()

    @torch.no_grad()
    def _check_mask(self, inputs: Any, tokens: int) -> None:
        """Refuse a mask of another length, and blocks in which real tokens see padding."""
        mask = self.config["mask"]
        if self.input_shape[mask] != (tokens,):
            raise ValueError(
                f"expected {mask!r}, which says where tokens are padding, to be of shape ({tokens},), got "
                f"{self.input_shape[mask]}; give the name of such an input as mask="
            )
        padded = inputs.clone()
        padded[mask][:, tokens - tokens // 2 :] = 0
        stand: Any = self._cut.enter(padded)
        for name in self._names:
            _check_tokens(name, stand)
            x, real = stand.x, tokens - tokens // 2
            y, other = stand(x.clone()), x.clone()
            other[:, real:] += torch.randn_like(other[:, real:])
            if not close(stand(other)[:, :real], y[:, :real]):
                raise ValueError(
                    f"expected blocks that are given a mask, so that no token sees padding; in {name!r}, tokens see "
                    f"those where {mask!r} is 0. Give the name of the input that says where padding is as mask="
                )
            stand = stand.follow(y)

    def _real(self, inputs: Any) -> Tensor | None:
        return inputs[self.config["mask"]] != 0 if self._padded else None

    def _standing(self, state: State) -> Standing:
        """Return what goes on from `state`; a copy or a merged state has to enter the module anew."""
        if state.held is not None:
            return state.held
        return self._cut.at(state.point, state.features[0], state.get(state.walk.inputs))

    def _lead(self, inputs: Any) -> tuple[Tensor, Any]:
        return _tokens(self._cut.enter(inputs))

    def _block(self, state: State) -> Block:
        return self._standing(state)

    def _follow(self, state: State, x: Tensor) -> tuple[Tensor, Any]:
        return _tokens(self._standing(state).follow(x))


def _tokens(stand: Standing | Tensor) -> tuple[Tensor, Any]:
    """Return the tokens of a stand and the stand, or outputs and None."""
    if isinstance(stand, Tensor):
        return stand, None
    # What runs on some tokens overwrites them, and a forward that is held may still need its own.
    return stand.x.clone() if isinstance(stand, Stand) else stand.x, stand


@torch.no_grad()
def _check_tokens(name: str, stand: Any) -> None:
    """Refuse a block that is given no tokens, or that needs to know where in its row a token stands."""
    example = stand.x.detach()
    if example.dim() != 3:
        raise ValueError(
            f"expected blocks of tokens [batch, tokens, channels]; {name!r} is given {list(example.shape)}"
        )
    x, tokens = torch.randn_like(example), example.shape[1]
    shuffled = torch.randperm(tokens, device=example.device)
    half = shuffled[: -(-tokens // 2)]
    try:
        whole = stand(x.clone())
        runs = [stand(x[:, some].clone(), None, some.unsqueeze(0)) for some in (shuffled, half, half.sort()[0])]
    except Exception as error:  # a user's block may raise anything on fewer tokens
        raise ValueError(f"expected blocks that run on any number of tokens; {name!r} does not: {error}") from error
    if not (close(runs[0], whole[:, shuffled]) and close(runs[1][:, half.argsort()], runs[2])):
        raise ValueError(
            f"expected blocks that treat tokens alike wherever they stand in the row; {name!r} does not: some tokens "
            "alone would mean nothing to it"
        )
