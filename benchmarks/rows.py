# SPDX-License-Identifier: Apache-2.0
"""Results as CSV files that only ever grow; the newest row of a measurement is the one that counts.

benchmarks/results/<device>.csv          operations, one row a shape, direction, dtype and implementation
benchmarks/results/<device>_models.csv   whole models, one row a phase
benchmarks/results/<device>_fastattention.csv   the claims of the FastAttention paper, one row a figure
benchmarks/results/<device>_flat_gemm_sweep.csv   tiles of flat_gemm, one row a tile and size
benchmarks/results/<device>_quantized_ablation.csv   loads and scales of quantized_matmul, one row a way and shape
benchmarks/results/<device>_log_bessel.csv   log I and log K, one row a function, region, order, type and implementation
benchmarks/results/<device>_vit.csv      vision transformers, one row a model, batch and variant
benchmarks/results/vit_compression.csv   what compressing them is worth, one row a variant
"""

import csv
import dataclasses
import functools
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from pallas_kernels.core import device as device_lib

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement of one operation. Figures are text, ready to read; "" is unknown or does not apply.

    Attributes:
      op, shape, direction, mask, dtype, implementation: what was measured.
      median_us, spread: microseconds of a call; distance between the quartiles as a fraction of the median.
      tflops: floating-point operations of the live part of the call over that time, 1e12 a second.
      gbs: inputs and outputs, each once, over that time, 1e9 bytes a second.
      percent_peak: time that the roofline (peak arithmetic, peak bandwidth, the slower of both) allows, over the
        median, in percent.
      baseline, ratio: the fastest baseline of the same process, and its time over this one: above 1 is faster.
      commit: of this repository, with "+" if it had changes.
      jax, device, timing: version, kind, and the method of benchmarks/timing.py.
    """

    op: str
    shape: str
    direction: str
    mask: str
    dtype: str
    implementation: str
    median_us: str
    spread: str
    tflops: str
    gbs: str
    percent_peak: str
    baseline: str
    ratio: str
    commit: str
    jax: str
    device: str
    timing: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows measurements of the same thing."""
        return (self.op, self.shape, self.direction, self.dtype, self.implementation)


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """One measurement of a phase of a model: "train", "prefill" or "decode".

    Attributes:
      model, phase, batch, length, dtype, remat, implementation: what was measured. `length` is the tokens of a row;
        for "decode", of the prompt.
      median_ms, spread: of one training step, one prefill or one decoded token of every row.
      tokens_per_second: of all rows together.
      mfu_percent: floating-point operations that the model needs (LlamaConfig.flops_per_token, three times for
        training, nothing for rematerialization) over the peak of the device.
      gbs: least bytes that decoding reads, 1e9 a second.
      attention_percent: share of attention in a step: what the step gets faster when attention is replaced by
        elementwise work on the same arrays.
      commit, jax, device: as in Row. Times are wall clock.
    """

    model: str
    phase: str
    batch: str
    length: str
    dtype: str
    remat: str
    implementation: str
    median_ms: str
    spread: str
    tokens_per_second: str
    mfu_percent: str
    gbs: str
    attention_percent: str
    commit: str
    jax: str
    device: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows measurements of the same thing."""
        fields = ("model", "phase", "batch", "length", "dtype", "remat", "implementation")
        return tuple(getattr(self, field) for field in fields)


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """One figure beside a claim of a paper.

    Attributes:
      part: which claim, for example "operator".
      case: what else is held fixed: the mask, the model.
      length: tokens of a row.
      variant: what is compared with the other variants of the same part, case and length.
      value, unit: the figure.
      commit, jax, device: as in Row.
    """

    part: str
    case: str
    length: str
    variant: str
    value: str
    unit: str
    commit: str
    jax: str
    device: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows measurements of the same thing."""
        return (self.part, self.case, self.length, self.variant)


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """One measurement of flat_gemm with one tile, for the sweep of FlashDecoding++'s Figure 7.

    Attributes:
      m, n, k: rows, output features, input features.
      dtype, implementation: as in Row.
      block_n, stages: output features of a block, tiles of the weight in shared memory; "" where a library chooses.
      median_us, gbs: as in Row.
      commit, jax, device: as in Row.
    """

    m: str
    n: str
    k: str
    dtype: str
    implementation: str
    block_n: str
    stages: str
    median_us: str
    gbs: str
    commit: str
    jax: str
    device: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows measurements of the same thing."""
        return (self.m, self.n, self.k, self.dtype, self.implementation, self.block_n, self.stages)


@dataclasses.dataclass(frozen=True)
class AblationRow:
    """One measurement of quantized_matmul, and what it would be without some of its arithmetic.

    Attributes:
      shape: name of the call, one of pallas_kernels/quantized_matmul/shapes.py.
      stages, scales_ahead: of MosaicGpuConfig; scales_ahead is "yes" or "no".
      median_us: microseconds of a call.
      gbs: bytes of the weight over that time, 1e9 a second.
      scales_us, decoding_us: microseconds of a call that leaves out the arithmetic of scales, and all of decoding.
      scales_percent, decoding_percent: what the call gets shorter by that, in percent.
      commit, jax, device: as in Row.
    """

    shape: str
    stages: str
    scales_ahead: str
    median_us: str
    gbs: str
    scales_us: str
    decoding_us: str
    scales_percent: str
    decoding_percent: str
    commit: str
    jax: str
    device: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows measurements of the same thing."""
        return (self.shape, self.stages, self.scales_ahead)


@dataclasses.dataclass(frozen=True)
class BesselRow:
    """One measurement of log I or log K.

    Attributes:
      function, region, order, dtype, implementation: what was measured; see benchmarks/log_bessel_speed.py.
      elements, median_us, spread: of a call.
      melements: millions of elements a second.
      over_tfp, over_scipy: times as fast as these, in the same process; SciPy on one core.
      commit, jax, device, timing: as in Row.
    """

    function: str
    region: str
    order: str
    dtype: str
    implementation: str
    elements: str
    median_us: str
    spread: str
    melements: str
    over_tfp: str
    over_scipy: str
    commit: str
    jax: str
    device: str
    timing: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows measurements of the same thing."""
        return (self.function, self.region, self.order, self.dtype, self.implementation)


@dataclasses.dataclass(frozen=True)
class VitRow:
    """One measurement of a vision transformer.

    Attributes:
      model, batch, variant: what was measured: a preset, images of a call, in which numbers.
      wall_us: microseconds from a call until the logits are there.
      busy_us: of its kernels.
      images_per_s: images of a call over the first of these.
      error: largest difference from logits in float32, over the largest of these.
      commit, jax, device, timing: as in Row; `timing` is that of busy_us.
    """

    model: str
    batch: str
    variant: str
    wall_us: str
    busy_us: str
    images_per_s: str
    error: str
    commit: str
    jax: str
    device: str
    timing: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows measurements of the same thing."""
        return (self.model, self.batch, self.variant)


@dataclasses.dataclass(frozen=True)
class CompressionRow:
    """What a way to compress a vision transformer came to, over several seeds.

    Attributes:
      variant: one of benchmarks/vit_compression.py.
      accuracy, lowest, highest: mean share of test images, and those of the worst and the best seed.
      bytes: of a model as it is stored; "" for what is not stored in fewer bits.
      ratio: bytes of the dense model in float32 over these.
      seconds: of training and testing all seeds.
      commit, jax, device: as in Row.
    """

    variant: str
    accuracy: str
    lowest: str
    highest: str
    bytes: str
    ratio: str
    seconds: str
    commit: str
    jax: str
    device: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows measurements of the same thing."""
        return (self.variant,)


AnyRow = Row | ModelRow | PaperRow | SweepRow | AblationRow | VitRow | BesselRow | CompressionRow


def number(value: float | None, digits: int = 4) -> str:
    """A figure with that many significant digits, never in exponent form; "" for None.

    >>> number(1234567.0), number(0.0123456), number(None)
    ('1235000', '0.01235', '')
    """
    if value is None:
        return ""
    text = f"{float(f'{value:.{digits}g}'):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def device_name(device: device_lib.Device | None = None) -> str:
    """Short name of a device for files: "h100", "a100", "v5e", "cpu".

    >>> device_name(device_lib.H100), device_name(device_lib.TPU_V5E), device_name(device_lib.CPU)
    ('h100', 'v5e', 'cpu')
    """
    device = device or device_lib.current()
    if device.platform == "tpu":
        return device.arch or "tpu"
    if device.platform == "cpu":
        return "cpu"
    words = device.kind.replace("-", " ").lower().split()
    ordinary = {"nvidia", "tesla", "geforce"}
    return next((word for word in words if word not in ordinary and any(c.isdigit() for c in word)), words[-1])


@functools.cache
def commit() -> str:
    """Short hash of the repository's commit, "+" after it if tracked files were changed; "" outside of one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=8", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or an archive of the source
        return ""


def environment() -> dict[str, str]:
    """The fields that every row of a process shares."""
    return {"commit": commit(), "jax": jax.__version__, "device": device_lib.current().kind}


def append[R: AnyRow](file: Path, rows: Sequence[R]) -> None:
    """Adds rows to a CSV file, which is made with its header if it is not there.

    Raises:
      ValueError: the file has other columns.
    """
    if not rows:
        return
    header = [field.name for field in dataclasses.fields(rows[0])]
    new = not file.exists()
    if not new:
        with file.open(newline="") as lines:
            if (found := next(csv.reader(lines), [])) != header:
                raise ValueError(f"{file}: has the columns {found}, not {header}; move it away or name another file")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, header, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def read[R: AnyRow](file: Path, kind: type[R]) -> list[R]:
    """The newest row of each measurement, in the order in which they were first measured.

    Raises:
      ValueError: the file has other columns.
    """
    with file.open(newline="") as lines:
        try:
            return newest([kind(**fields) for fields in csv.DictReader(lines)])
        except TypeError as error:
            raise ValueError(f"{file}: does not hold rows of {kind.__name__}: {error}") from error


def newest[R: AnyRow](rows: Iterable[R]) -> list[R]:
    """Drops every row that a later one replaces."""
    return list({row.key: row for row in rows}.values())
