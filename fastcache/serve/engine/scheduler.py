"""Jobs -> what to run next: which images get a slot, and which of them share the next engine call.

Decisions only, in plain Python. Knows nothing about tensors, threads or HTTP: `executor.py` runs what is decided here,
`worker.py` calls both.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

from fastcache.cut.names import FULL
from fastcache.loop.plan import CachePlan

# Engine calls that an image lets pass before its own group runs: a shallow step costs a tenth of a full one, so this
# costs it less than a step, and requests that need a full step gather meanwhile.
PATIENCE: Final = 8
_SHALLOW: Final = 0.25  # what a shallow step takes of a full one, where nobody has timed it
_SHORT: Final = 4  # times shorter than another is a job that need not wait for a slot

Content = TypeVar("Content")  # what a job brings along for who runs it


class QueueFull(RuntimeError):
    """No room for another job now."""


class Kind(NamedTuple):
    """What images must have in common to share an engine call."""

    bundle: int
    size: str
    name: str  # of the pass
    guided: bool


@dataclass(eq=False)
class Image(Generic[Content]):
    """One image of a job: where it lies, and which U-Net call it runs next."""

    job: Job[Content]
    index: int
    slot: int | None = None
    step: int = 0
    waited: int = 0
    is_drawn: bool = False

    @property
    def kind(self) -> Kind:
        job = self.job
        return Kind(job.bundle, job.size, job.plan.passes[self.step], job.guided and job.plan.is_guided(self.step))

    @property
    def is_finished(self) -> bool:
        return self.step == self.job.plan.num_steps


@dataclass(eq=False)
class Job(Generic[Content]):
    """A request: `count` images of a size after one plan, by one bundle's engines. `content` is for who runs it."""

    id: str
    bundle: int
    size: str
    plan: CachePlan
    guided: bool
    count: int
    deadline: float
    content: Content
    owner: str = ""  # who asked for it, if that is known; else each job counts as a client of its own
    images: list[Image[Content]] = field(init=False)

    def __post_init__(self) -> None:
        self.images = [Image(self, index) for index in range(self.count)]

    @property
    def work(self) -> int:
        """U-Net calls of all its images."""
        return self.count * self.plan.num_steps

    @property
    def client(self) -> str:
        """Who shares turns with others as one: all jobs of an owner, or the job alone."""
        return self.owner or self.id

    @property
    def has_begun(self) -> bool:
        return any(image.slot is not None or image.step for image in self.images)


@dataclass(frozen=True)
class Batch(Generic[Content]):
    """Images that take their next step together: in one engine call, or on a CPU in one each at once."""

    kind: Kind
    images: Sequence[Image[Content]]


class Scheduler(Generic[Content]):
    """Who runs next. Images wait for a slot of their bundle; those that have one run in groups.

    Clients share time alike, however many images each has: one that got a full step more than another waits for it,
    and beside others it brings no more images to a call than the one with the fewest. So a job of eight long images
    takes from a short one what another short one would take.
    """

    def __init__(self, queue: int) -> None:
        self.queue = queue
        self.waiting: deque[Image[Content]] = deque()
        self.running: list[Image[Content]] = []
        self.jobs: dict[str, Job[Content]] = {}
        self._slots: dict[int, int] = {}
        self._free: dict[int, list[int]] = {}
        self._most: dict[int, int] = {}
        self._reserved: dict[int, int] = {}  # images of jobs in preparation, by bundle
        self._retired: set[int] = set()
        self._express: dict[int, int] = {}
        self._costs: dict[tuple[int, str], float] = {}
        self._taken: dict[str, float] = {}  # time that each client with jobs has had

    def open(self, bundle: int, slots: int, express: int = 0) -> None:
        """Serve one more bundle, with so many images in flight, and `express` more of jobs that are short."""
        self._slots[bundle] = self._most[bundle] = slots
        self._express[bundle] = express
        self._free[bundle] = list(range(slots + express))[::-1]

    def note_cost(self, bundle: int, name: str, seconds: float) -> None:
        """What a step by a pass takes an image."""
        self._costs[bundle, name] = seconds

    def _cost(self, bundle: int, name: str) -> float:
        """What a step costs, in seconds or, of a bundle that nobody has timed, in full steps."""
        return self._costs.get((bundle, name), 1.0 if name == FULL else _SHALLOW)

    def retire(self, bundle: int) -> None:
        """Let a bundle go once its last job has ended. Until then its jobs go on, and more may be added."""
        self._retired.add(bundle)

    def close_idle(self) -> list[int]:
        """Forget the retired bundles that no job needs any more. Returns them."""
        idle = [bundle for bundle in self._retired if not self.is_used(bundle)]
        for bundle in idle:
            del self._slots[bundle], self._free[bundle], self._most[bundle], self._express[bundle]
            self._reserved.pop(bundle, None)
            self._retired.remove(bundle)
        return idle

    def is_used(self, bundle: int) -> bool:
        """Whether a job needs a bundle, one in preparation included."""
        return bool(self._reserved.get(bundle)) or any(job.bundle == bundle for job in self.jobs.values())

    @property
    def outstanding(self) -> int:
        """Images accepted and not finished, those included that room was only reserved for."""
        return len(self.waiting) + len(self.running) + sum(self._reserved.values())

    def outstanding_of(self, bundle: int) -> int:
        """As `outstanding`, of one bundle."""
        own = sum(image.job.bundle == bundle for image in (*self.waiting, *self.running))
        return own + self._reserved.get(bundle, 0)

    def room_for(self, bundle: int) -> int:
        """How many more images of a bundle there is room for: its slots, and what of the one queue others leave."""
        excess = {own: self.outstanding_of(own) - slots for own, slots in self._slots.items()}
        others = sum(max(0, images) for own, images in excess.items() if own != bundle)
        return self.queue - others - excess[bundle]

    def would_wait(self, bundle: int, images: int) -> bool:
        """Whether there are fewer free slots than images, those of jobs in preparation counted."""
        waiting = sum(image.job.bundle == bundle for image in self.waiting)
        return len(self._free[bundle]) - self._express[bundle] < images + waiting

    def reserve(self, images: int, bundle: int) -> None:
        """Keep room, and the bundle, for a job that is still being prepared. Raises: `QueueFull`."""
        room = self.room_for(bundle)
        if images > room:
            raise QueueFull(f"expected at most {max(0, room)} images more, got {images}")
        self._reserved[bundle] = self._reserved.get(bundle, 0) + images

    def release(self, images: int, bundle: int) -> None:
        """Give up what was reserved."""
        self._reserved[bundle] -= images

    def add(self, job: Job[Content]) -> None:
        """Put a job, for which room was reserved, into the queue."""
        self.release(job.count, job.bundle)
        # As if it had had as much as who had the least: neither credit for having been away, nor a debt.
        self._taken.setdefault(job.client, min(self._taken.values(), default=0.0))
        self.jobs[job.id] = job
        self.waiting.extend(job.images)

    def drop(self, job: Job[Content]) -> None:
        """Take a job out, wherever it is: done, cancelled or late. Twice is as good as once."""
        self.jobs.pop(job.id, None)
        if not any(other.client == job.client for other in self.jobs.values()):
            self._taken.pop(job.client, None)
        self.waiting = deque(image for image in self.waiting if image.job is not job)
        for image in job.images:
            self._vacate(image)

    def overdue(self, now: float) -> list[Job[Content]]:
        return [job for job in self.jobs.values() if job.deadline <= now]

    @property
    def next_deadline(self) -> float | None:
        return min((job.deadline for job in self.jobs.values()), default=None)

    @property
    def queued(self) -> list[Job[Content]]:
        """The jobs of which no image has begun."""
        return [job for job in self.jobs.values() if not job.has_begun]

    def admit(self) -> list[Image[Content]]:
        """Give the free slots to who has the fewest, and of these to who has waited longest."""
        admitted = list[Image[Content]]()
        held = Counter(image.job.client for image in self.running)
        while free := [image for image in self.waiting if self._has_slot(image.job)]:
            image = min(free, key=lambda one: held[one.job.client])
            image.slot = self._free[image.job.bundle].pop()
            self.waiting.remove(image)
            self.running.append(image)
            held[image.job.client] += 1
            admitted.append(image)
        return admitted

    def _has_slot(self, job: Job[Content]) -> bool:
        """Whether there is a slot for a job: an express one only if it is short beside one that holds a slot."""
        free = len(self._free[job.bundle])
        if free > self._express[job.bundle] or not free:
            return bool(free)
        longest = max((other.job.work for other in self.running if other.job.bundle == job.bundle), default=0)
        return _SHORT * job.work <= longest

    def next_batch(self) -> Batch[Content] | None:
        """The group to run now: shallow before full, for it is cheap and full steps gather; none waits for ever."""
        if not self.running:
            return None
        if len(self.running) == 1:
            return Batch(self.running[0].kind, tuple(self.running))
        able = self._whose_turn()
        groups: dict[Kind, list[Image[Content]]] = {}
        for image in sorted(able, key=lambda image: -image.waited):
            groups.setdefault(image.kind, []).append(image)
        oldest, group = next(iter(groups.items()))
        if group[0].waited < PATIENCE:
            oldest = min(groups, key=lambda kind: (kind.name == FULL, -len(groups[kind])))
        chosen = groups[oldest][: self._most[oldest.bundle]]
        for image in able:
            image.waited += 1
        # In the same order whenever the same images meet: what they share then lies where it lay.
        return Batch(oldest, sorted(chosen, key=lambda image: image.slot or 0))

    def _whose_turn(self) -> list[Image[Content]]:
        """The images that may run now: of clients that are not ahead of another, as many of each as of any."""
        counts = Counter(image.job.client for image in self.running)
        if len(counts) == 1:
            return self.running
        least = min(self._taken[client] for client in counts)
        most = max(self._cost(bundle, FULL) for bundle in {image.job.bundle for image in self.running})
        able = {client for client in counts if self._taken[client] <= least + most}
        left = dict.fromkeys(able, min(counts.values()))
        turn = list[Image[Content]]()
        for image in sorted(self.running, key=lambda image: -image.waited):
            client = image.job.client
            if client in able and left[client]:
                left[client] -= 1
                turn.append(image)
        return turn

    def split(self, batch: Batch[Content]) -> tuple[Batch[Content], Batch[Content]]:
        """After a batch was too large: its two halves, and no larger ones of its bundle from now on."""
        half = len(batch.images) // 2
        if not half:
            raise ValueError("expected a batch of two images or more to split, got one")
        self._most[batch.kind.bundle] = len(batch.images) - half
        return Batch(batch.kind, batch.images[:-half]), Batch(batch.kind, batch.images[-half:])

    def advance(self, images: Sequence[Image[Content]]) -> list[Image[Content]]:
        """These have run. Returns those that took a step; a finished one keeps its slot until `finish`."""
        moved = [image for image in images if image.slot is not None]
        for image in moved:
            if image.job.client in self._taken:
                self._taken[image.job.client] += self._cost(image.job.bundle, image.kind.name)
            image.step, image.waited = image.step + 1, 0
        return moved

    def finish(self, image: Image[Content]) -> bool:
        """An image is drawn and its slot free. Returns whether it was its job's last."""
        self._vacate(image)
        image.is_drawn = True
        if image.job.id not in self.jobs or not all(other.is_drawn for other in image.job.images):
            return False
        self.drop(image.job)
        return True

    def _vacate(self, image: Image[Content]) -> None:
        if image.slot is not None:
            self._free[image.job.bundle].append(image.slot)
            self.running.remove(image)
            image.slot = None
