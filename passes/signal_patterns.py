"""The annotations of ops on images, signals and complex numbers (see `passes.patterns`)."""

from __future__ import annotations

from passes.patterns import Call, Pattern, Text, all_whole, dim_names


def _space(side: str, dims: int) -> str:
    return " ".join(f"[{side}{k}]" for k in range(dims))


def planes(dims: int, *others: str) -> Pattern:
    """The last `dims` dims of the first argument stay whole and change their size; `others` gives the last dims of the
    further arguments."""

    def pattern(call: Call) -> str:
        inputs = [f"... {_space('x', dims)}", *(f"... {other}" for other in others)][: len(call.inputs)]
        result = f"... {_space('y', dims)}"
        return f"{', '.join(inputs)} -> {', '.join([result] * len(call.outputs))}"

    return pattern


def shuffled_pixels(call: Call) -> Text:
    """pixel_shuffle: each channel of the result comes from a block of channels."""
    factor = call.args[1]
    return f"... (c [f]) {_space('x', 2)} -> ... c {_space('y', 2)}", (("f", factor * factor),)


def unshuffled_pixels(call: Call) -> Text:
    """The inverse."""
    factor = call.args[1]
    return f"... c {_space('x', 2)} -> ... (c [f]) {_space('y', 2)}", (("f", factor * factor),)


def shuffled_channels(call: Call) -> Text:
    """Groups of channels become channels of groups."""
    space = _space("x", call.rank() - 2)
    return f"n (g c) {space} -> n (c g) {space}", (("g", call.args[1]),)


def patches(call: Call) -> Text:
    """im2col: channels and the positions in a patch in one dim."""
    kernel = call.args[1]
    return f"... c {_space('x', 2)} -> ... (c [k]) [l]", (("k", kernel[0] * kernel[-1]),)


def from_patches(call: Call) -> Text:
    """col2im, its inverse."""
    kernel = call.args[2]
    return f"... (c [k]) [l] -> ... c {_space('y', 2)}", (("k", kernel[0] * kernel[-1]),)


def sampled(dims: int) -> Pattern:
    """grid_sampler: the result's positions are those of the grid."""
    places = " ".join(f"p{k}" for k in range(dims))
    return lambda call: f"n c {_space('x', dims)}, n {places} [xy] -> n c {places}"


def instance_norm(call: Call) -> str:
    """Rows and channels may be split, unless running statistics are kept: those mix rows, and every rank holds them."""
    if len(call.inputs) > 1 and any(
        call.argument(at, name) is not None for at, name in ((3, "running_mean"), (4, "running_var"))
    ):
        return all_whole(call)
    space = _space("x", call.rank() - 2)
    return ", ".join([f"n c {space}"] + ["c"] * (len(call.inputs) - 1)) + f" -> n c {space}"


def windows(call: Call) -> str:
    """Tensor.unfold: one dim in windows, which become a new last dim."""
    names, dim = dim_names(call.rank()), call.args[1] % call.rank()
    left = [f"[{name}]" if k == dim else name for k, name in enumerate(names)]
    right = ["[windows]" if k == dim else name for k, name in enumerate(names)]
    return f"{' '.join(left)} -> {' '.join(right)} [window]"
