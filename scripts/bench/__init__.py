"""Each file is a suite of `dynrl bench`."""
