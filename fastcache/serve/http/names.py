"""The jobs of a server by their names: who may ask for each, and how the last ones ended."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from fastcache.serve.http.errors import ApiError

_REMEMBERED: Final = 4096  # jobs whose end a late cancel can still ask for


@dataclass(eq=False)
class Known:
    """A job by its name: whose key asked for it, and how it ended."""

    owner: bytes | None
    ended: str | None = None


class Names:
    """Names in use, those of jobs in preparation too, and of jobs that ended not long ago."""

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}
        self._past: deque[str] = deque()  # of these the ones that ended

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def take(self, name: str, owner: bytes | None) -> Known:
        """A name for a new job. Raises: `ApiError` for one in use."""
        if name in self._known:
            raise ApiError(409, "job_id: expected a new name, got one in use", code="job_exists", param="job_id")
        known = self._known[name] = Known(owner)
        return known

    def find(self, name: str, owner: bytes | None) -> Known:
        """Raises: `ApiError` for a job that there is not, or not any more, or that another key asked for."""
        known = self._known.get(name)
        if known is None or known.owner != owner:
            message = "there is no job of this name, or it ended long ago"
            raise ApiError(404, message, code="job_not_found", param="job_id")
        return known

    def free(self, name: str) -> None:
        """There is no such job after all."""
        del self._known[name]

    def end(self, name: str, status: str) -> None:
        """Remember how a job ended, in place of the one that ended first."""
        self._known[name].ended = status
        self._past.append(name)
        if len(self._past) > _REMEMBERED:
            del self._known[self._past.popleft()]
