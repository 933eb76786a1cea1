"""Memory to save and to load a model, as multiples of its weights: python bench/memory_saved.py [--channels 192]

Each part runs in a process of its own. Anonymous memory (RssAnon, without mapped files) is sampled every 2 ms, and
counted from just before the call. Saving is given weights mapped from a file and a network on the meta device.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from onejump.model import ConsistencyModel
from onejump.networks import ADMUNetConfig
from onejump.networks.layers import empty_network
from onejump.samplers import Multistep
from onejump.saved import SavedModel, load_model, save_model

PLACES = {"folder": "model", "single file": "model.safetensors"}


def anonymous() -> int:
    """Bytes of this process's anonymous memory that are in RAM."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def peak_of(work: Callable[[], object]) -> tuple[int, float]:
    """(bytes at the peak above those before, seconds)."""
    before, seen, done = anonymous(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            seen[0] = max(seen[0], anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    began = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    del kept
    return max(seen[0], before) - before, seconds


def part(name: str, folder: Path, channels: int) -> tuple[int, float]:
    network = ADMUNetConfig(label_dim=1000, model_channels=channels)
    kind, place = name.split(" ", 1)
    if kind == "load":
        return peak_of(lambda: load_model(folder / PLACES[place]))
    saved = SavedModel(ConsistencyModel(empty_network(network)), network, Multistep(), (3, 64, 64))
    weights = load_file(folder / "given.safetensors")
    if kind == "transposed":
        weights = {name: w.view(w.shape[::-1]).permute(*reversed(range(w.ndim))) for name, w in weights.items()}
    return peak_of(lambda: save_model(folder / PLACES[place], saved, weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=192)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(*part(args.part, args.folder, args.channels))
        return
    with tempfile.TemporaryDirectory() as folder:
        net = ADMUNetConfig(label_dim=1000, model_channels=args.channels).build()
        save_file(net.state_dict(), Path(folder) / "given.safetensors")
        sizes = [tensor.nbytes for tensor in net.state_dict().values()]
        del net
        total = sum(sizes)
        print(f"weights: {total / 1e6:.0f} MB, the largest tensor {max(sizes) / total:.3f} of them")
        for name in [f"{kind} {place}" for place in PLACES for kind in ("save", "transposed", "load")]:
            command = [sys.executable, __file__, "--part", name, "--folder", folder, "--channels", str(args.channels)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak, seconds = map(float, done.stdout.split())
            print(f"{name:<24} {peak / total:6.3f} of the weights   {seconds:6.1f} s")


if __name__ == "__main__":
    main()
