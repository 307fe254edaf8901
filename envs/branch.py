"""`dynrl/Branch-v0` is the environment of the decision which module comes next."""

from __future__ import annotations

from dynrl.backbones import Backbone, RoutingNet
from dynrl.envs.core import RoutingVectorEnv

PHOTO = 4  # the most channels of images that tell no task


class BranchVectorEnv(RoutingVectorEnv):
    """At each layer of a network of modules, which module does this input take, or does it pass the layer by?

    In a tree of modules, which child of a node does it take, or are the answers of both mixed? In a forest, is the vote
    of some trees enough? In a grid of scales, does its map go to a coarser or a finer scale, or stay? In a stack
    machine, which module does a question about an image need next?

    ## Features
    Of a `RoutingNet`: the mean of each channel of the features before the layer; where inputs tell a task, also that
    (one-hot), and the log-probabilities that the network's own table gives the layer's modules for it, by which an
    untrained policy draws.

    Of a `NeuralTree`: the probability that the node's own router gives the child that it prefers, that of the right
    child, the weight of the row's present path in its mixture (1 if it took one child at each node above), and the mean
    of each channel at the node. Between the trees of a forest: the vote's highest class probability, its lead over the
    second one and the entropy divided by its maximum, and the mean of each channel behind the stem.

    Of a `ScaleGrid`: the mean of each channel of the map, at the scale where the row is, and how much detail of each
    channel each coarser scale in turn would lose.

    Of `NeuralModules`: how many words of the question are left, those for the thing, for the side and for the other
    apart; of each map on the stack, the top one first, its greatest and its mean number and how many words of each kind
    made it; which choices a word of each kind still asks for; and log-odds of all choices, by which an untrained policy
    draws: modules that a word asks for are likely, and And is likeliest. How many maps there are is the point.

    ## Action
    `Discrete(n)`: action m runs module m of the layer. Modules are whole parts of a network: they may be of different
    structure (convolutions of different size, say) and cost, or alike. They are ordered from cheap to dear, and the
    first one may be none: the features pass at no cost. All rows that chose a module are computed together, and rows
    meet again behind the layer.

    In a `NeuralTree`, action 0 takes the child that the node's own router prefers, 1 takes both, and 2 the other child.
    After 1, the row first walks on the left side of the node and then on the right one, and the router's probabilities
    weigh their answers. Behind each tree of a forest but the last, action 0 stops: the answer is the mean of those of
    the trees so far. Action 1 goes on through the next tree.

    In a `ScaleGrid`, action 0 brings the map to the next coarser scale, 1 keeps it at its scale, and 2 brings it to the
    next finer one. Beyond the finest and the coarsest, choices are closed.

    In `NeuralModules`, action 0 joins the two top maps (And), 1 answers by the last one, and 2, only at the empty
    stack, asks one network instead. The next actions move the top map, each to one side. Then follow those that find a
    property in the image, each of which pushes a map. What the stack does not allow is closed.

    ## Episode
    One input. The episode ends after the last layer, so it has as many steps as the network has layers. In a tree, it
    ends when all that the row has taken is walked: there are as many steps as inner nodes at most. In a forest, it ends
    behind a tree. In `NeuralModules`, it ends with an answer, after at most as many modules as the backbone allows.

    ## Data
    The default is `digit-tasks`: five tasks on small images of digits. `many-tasks` has seven on clothes and digits. In
    both, each input tells its task. Trees have defaults on `digits` and `fashion-mnist`, grids on `digit-views`: digits
    seen from near or far, whose pixels have classes. `NeuralModules` have defaults on `shapes`.

    ## Source
    Routing Networks: Adaptive Selection of Non-linear Functions for Multi-Task Learning, Rosenbaum et al., ICLR 2018;
    Dynamic Deep Neural Networks: Optimizing Accuracy-Efficiency Trade-offs by Selective Execution, Liu & Deng, AAAI
    2018 (modules of unequal cost, chosen by Q-learning); Adaptive Neural Trees, Tanno et al., ICML 2019 (trees);
    Learning Dynamic Routing for Semantic Segmentation, Li et al., CVPR 2020 (grids of scales);
    Learning to Reason: End-to-End Module Networks for Visual Question Answering, Hu et al., ICCV 2017 (stacks).

    ## Version history
    v0: the first version.
    """

    decision = "branch"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return a small untrained network of three layers; if there are many channels, all but one tell the task."""
        image = 1 if input_shape[0] > PHOTO else None
        return RoutingNet(input_shape, image_channels=image, channels=8, kernels=(0, 1, 3, 3))  # type: ignore[arg-type]
