"""Which layers share a block, where layers differ in how far back they look.

The simple thing is a block that holds all layers. Then a model of which one layer in six sees
everything keeps everything in all six. So layers are put into groups of equal size, each of layers
with the same window, and a block holds one group only:

    layers      s s s s s f s s s s s f        f sees everything, s through a window
    group 0               0           1        all of f
    group 1     0 1                            two of s to a group, as there are two f
    group 2         0 1  …

All blocks have the same bytes and come from one pool; what a window has left is given back group by
group. Groups that are not full are padded, which wastes a part of each of their blocks.

Groups of equal size, so that one pool serves all kinds of layers, are those of vLLM's hybrid KV
cache manager.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pageframe.core.units import ceil_div

# Each group costs books of its own in every step.
_NUM_GROUPS_MAX = 16
# Fewer groups are worth so much of each token's memory.
_PADDING_MAX = 0.125


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroups:
    """Groups of the layers of one model.

    Attributes:
        windows: Positions that a token sees in each group, itself included; 0 for all.
        num_layers_each: Layers that a block has room for.
        places: Group of each layer, and its place in the blocks of the group.
    """

    windows: tuple[int, ...]
    num_layers_each: int
    places: tuple[tuple[int, int], ...]

    @property
    def num_layers(self) -> int:
        """Layers that the blocks of all groups together have room for."""
        return len(self.windows) * self.num_layers_each


def one_group(num_layers: int, window: int = 0) -> LayerGroups:
    """All layers together."""
    places = tuple((0, layer) for layer in range(num_layers))
    return LayerGroups(windows=(window,), num_layers_each=num_layers, places=places)


def group_layers(windows: Sequence[int]) -> LayerGroups:
    """Put layers into groups; as few as waste little.

    Args:
        windows: Of each layer, positions that a token sees, itself included; 0 for all.
    """
    layers_of: dict[int, list[int]] = {}
    for layer, window in enumerate(windows):
        layers_of.setdefault(window, []).append(layer)
    if len(layers_of) == 1:
        return one_group(len(windows), windows[0])
    counts = [len(layers) for layers in layers_of.values()]
    num_layers_each = _best_size(counts)
    places: list[tuple[int, int]] = [(0, 0)] * len(windows)
    group_windows: list[int] = []
    for window, layers in sorted(layers_of.items()):
        for index, layer in enumerate(layers):
            group = len(group_windows) + index // num_layers_each
            places[layer] = (group, index % num_layers_each)
        group_windows += [window] * ceil_div(len(layers), num_layers_each)
    return LayerGroups(
        windows=tuple(group_windows), num_layers_each=num_layers_each, places=tuple(places)
    )


def _best_size(counts: list[int]) -> int:
    """How many layers a block should have, if there are so many of each window."""

    def rank(size: int) -> tuple[bool, bool, float, int]:
        num_groups = sum(ceil_div(count, size) for count in counts)
        padding = num_groups * size / sum(counts) - 1
        wastes = padding > _PADDING_MAX
        return num_groups > _NUM_GROUPS_MAX, wastes, padding if wastes else num_groups, num_groups

    return min(range(1, max(counts) + 1), key=rank)
