"""Memory that exists, counted: not what a list says, but what PyTorch still holds."""

from collections.abc import Iterable
from weakref import WeakSet

from torch import Tensor


class Storages(WeakSet):
    """The storages of tensors, each as long as something refers to it, whoever that is."""

    def note(self, tensors: Iterable[Tensor]) -> None:
        self.update(tensor.untyped_storage() for tensor in tensors)

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self)
