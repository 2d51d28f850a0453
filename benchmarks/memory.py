"""Peak memory of one call on a CPU: how far the resident set grows in a fresh process.

A server process imports everything and starts no thread; each question is answered by a fork of it,
so that no allocator's leftovers hide the growth. Linux only; elsewhere the answer is None. The
result of the call (value, gradient) counts, z does not.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

from . import cases

SUPPORTED = sys.platform == "linux"


class MemoryProbe:
    """``with MemoryProbe() as probe: probe.peak(...)``"""

    def __init__(self, enabled: bool = True):
        self._enabled = enabled and SUPPORTED

    def __enter__(self):
        self._server = None
        if self._enabled:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.memory"],
                cwd=Path(__file__).parent.parent,
                # Waiting threads sleep: on a busy machine spinning ones take a minute per answer.
                env=os.environ | {"OMP_WAIT_POLICY": "passive"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self

    def __exit__(self, *_):
        if self._server is not None:
            self._server.stdin.close()
            self._server.stdout.close()
            self._server.wait()

    def peak(self, shape: cases.Shape, quantity: str, direction: str, name: str) -> int | None:
        """Bytes; None where it cannot be measured."""
        if self._server is None:
            return None
        try:
            self._server.stdin.write(json.dumps([shape, quantity, direction, name]) + "\n")
            self._server.stdin.flush()
            return json.loads(self._server.stdout.readline() or "null")
        except BrokenPipeError:
            return None


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """The most that it ever was."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _grow(shape: cases.Shape, quantity: str, direction: str, name: str) -> int:
    implementation = cases.implementations(quantity, shape, "cpu")[name]

    def call(shape):
        z = cases.make_inputs(shape, "cpu", 1)
        grad = cases.cotangent(quantity, z[0])
        grad = grad.to(cases.value_dtype(name, quantity, shape.dtype))
        return implementation.prepare(z, direction, grad)[0]

    call(cases.Shape(2, 8, 8, shape.dtype))()  # thread stacks, code pages
    ready = call(shape)
    before = resident()
    out = ready()
    peak = peak_resident()
    del out
    return max(0, peak - before)


def _serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                shape, *rest = json.loads(line)
                answer = _grow(cases.Shape(*shape), *rest)
                os.write(1, f"{answer}\n".encode())
            except BaseException as error:
                print(f"benchmarks.memory: {error!r}", file=sys.stderr)
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            os.write(1, b"null\n")


if __name__ == "__main__":
    _serve()
