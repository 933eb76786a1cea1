"""Time and memory of a Frechet distance at FID's size: 50,000 features of 2,048 dimensions against a reference.

    python bench/frechet.py [--n 50000] [--d 2048] [--batch 256] [--interval]

The features are drawn batch by batch (float32, correlated, with decaying variances as Inception's have) and added to
the running statistics; then the distance. Prints wall and CPU seconds of both parts, without the drawing, and the peak
of resident memory of the process.
"""

import argparse
import resource
import time
from collections.abc import Iterator

import torch

from onejump.evaluation.bootstrap import frechet_interval
from onejump.evaluation.statistics import GaussianStatistics, Moments, frechet_distance


def batches(n: int, d: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, d + 1).float().rsqrt()
    for start in range(0, n, batch):
        rows = torch.randn(min(batch, n - start), d, generator=generator) * scales
        yield (rows + rows.roll(1, 1)).relu()  # half of the entries are 0, neighbours correlate


class Clock:
    """Wall and CPU seconds of the parts put under it."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *error: object) -> None:
        self.wall += time.perf_counter() - self.began[0]
        self.cpu += time.process_time() - self.began[1]

    def __str__(self) -> str:
        return f"{self.wall:6.1f} s, {self.cpu:6.1f} CPU s"


def statistics(n: int, d: int, batch: int, seed: int, clock: Clock) -> GaussianStatistics:
    moments = Moments()
    for features in batches(n, d, batch, seed):
        with clock:
            moments.add(features)
    return moments.statistics()


def peak() -> str:
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def main() -> None:
    read = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    read.add_argument("--n", type=int, default=50_000)
    read.add_argument("--d", type=int, default=2048)
    read.add_argument("--batch", type=int, default=256)
    read.add_argument(
        "--interval", action="store_true", help="also the bootstrap interval, with all features in memory"
    )
    args = read.parse_args()
    print(f"{args.n} x {args.d}, batches of {args.batch}, {torch.get_num_threads()} threads")
    reference = statistics(2 * args.d, args.d, args.batch, 1, Clock())
    adding, rooting, resampling = Clock(), Clock(), Clock()
    own = statistics(args.n, args.d, args.batch, 0, adding)
    with rooting:
        distance = frechet_distance(own, reference)
    print(f"statistics {adding}\ndistance   {rooting}\npeak       {peak()}   distance {distance:.6f}")
    if args.interval:
        features = torch.cat(list(batches(args.n, args.d, args.batch, 0)))
        with resampling:
            low, high = frechet_interval(features, reference, distance)
        print(f"interval   {resampling}\npeak       {peak()}   from {low:.6f} to {high:.6f}")


if __name__ == "__main__":
    main()
