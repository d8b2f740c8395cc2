"""A small cache of what was used last."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Cache(Generic[K, V]):
    """Keeps the values used last, as long as their sizes add up to no more than `capacity`; always the very last.

    Threads may share it: two that want the same value at once may both make it.
    """

    def __init__(self, capacity: int, size: Callable[[V], int]) -> None:
        self._capacity, self._size = capacity, size
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._used = 0
        self._lock = Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """Returns the value of a key, made if it is not there."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value = make()
        size = self._size(value)
        with self._lock:
            if key in self._values:  # another thread was first
                self._used -= self._values.pop(key)[1]
            self._values[key] = value, size
            self._used += size
            while self._used > self._capacity and len(self._values) > 1:
                _, (_, freed) = self._values.popitem(last=False)
                self._used -= freed
        return value
