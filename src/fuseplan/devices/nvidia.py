"""NVIDIA's GPUs: torch's names of them, and the constants of each with their sources.

H200's were measured. The other GPUs have the same ones, or scaled by ratios from NVIDIA's datasheets, and the source of
each says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from fuseplan.devices.derivation import (
    COPIED,
    H100_COPY,
    PLAIN,
    Like,
    derived,
    like,
    ns,
    operations,
    rate,
    ratio,
    renamed,
    scaled,
    size,
)
from fuseplan.devices.errors import HOPPER_ERRORS, UNMEASURED_ERRORS
from fuseplan.devices.hardware import Attention, Dispatch, Error, Hardware, Linear, Peers, Protocol
from fuseplan.devices.profile import DeviceProfile
from fuseplan.devices.reduces import (
    ANY_VLLM,
    B200_VLLM,
    B300_VLLM,
    BLACKWELL_LIBRARY,
    BLACKWELL_SHOTS,
    HOPPER_LIBRARY,
    HOPPER_SHOTS,
    HOPPER_VLLM,
    NCCL,
    OURS,
    PAIR_VLLM,
)

_RUN_1 = (
    "benchmarks/data/h200x2-ar-add-rms-pad.json, 2 x H200, 2026-11-22: fitted on run 1, columns U, C, B, D, by "
    "benchmarks/calibrate_costs.py on 2026-11-23"
)
_RUN_2 = _RUN_1.replace("run 1, columns U, C, B, D,", "run 2, column F,")
_GPU_BENCHES = "github.com/te42kyfo/gpu-benches, gpu-small-kernels/h200_graph.txt (streams in a CUDA graph)"

_ATTENTION_RUN = "benchmarks/results/decode_one_gpu_h100.json, H100, 2026-11-28"
_H100_RATE = "half of 798 TFLOP/s, an 8192^3 product in bfloat16 on an H100; the same whatever is fused"
H100_ATTENTION: Final = Attention(
    latency=ns(8000, f"{_ATTENTION_RUN}: cuDNN on unrepeated heads at batch 1, 9.2 us, less the bytes"),
    split=ns(
        5500, "an H200, 2026-11-29: fuseplan's kernels at batch 1, 1,280 keys, 32 heads of 128, 6.7 us, less the bytes"
    ),
    key=ns(18.5, f"{_ATTENTION_RUN}: cuDNN on packed heads at batch 8, 31.6 us for 1,280 keys, less the latency"),
    rate=operations(400_000, _H100_RATE),
    row_rate=operations(400_000, "as `rate`: one query waits for memory"),
    narrow_row_rate=operations(400_000, "as `rate`: one query waits for memory"),
    product_rate=operations(400_000, "as `rate`: no kernel takes float32 here"),
    narrow_product_rate=operations(400_000, _H100_RATE),
)
_LINEAR_RUN = (
    "benchmarks/results/skinny_linear_h200.json, H200, 2026-11-29: 4,096 to 6,144, to 28,672 and to 4,096, and 14,336 "
    "to 4,096 in bfloat16, 1 to 32 rows; the mean time beside the bytes of the weights"
)
_SCALED_RUN = (
    "an H200, 2026-11-29, torch 2.11 (CUDA 13.0): 4,096 to 4,096, to 4,096 + 1,024 + 1,024 and to 14,336 + 14,336, and "
    "14,336 to 4,096 in fp8, 1 to 32 rows"
)
H200_LINEAR: Final = Linear(
    library=ns(4300, f"{_LINEAR_RUN}, for each of torch's products (3.1 to 5 us)"),
    skinny=ns(2200, f"{_LINEAR_RUN} (0.3 to 3.5 us)"),
    idle=ratio(1.1, f"{_LINEAR_RUN}: 4,096 and 14,336 to 4,096 of 32 rows, 11.05 and 32.93 us, less the latency"),
    idle_few=ratio(1.01, "an H200, 2026-11-29, the same layers of 1 and 8 rows between others: 0.1 to 0.4 us"),
    scaled_library=ns(4000, f"{_SCALED_RUN}: 13.5 and 36.9 us of one layer to 4,096, less the columns"),
    scaled_column=ns(2.3, f"{_SCALED_RUN}: (36.9 - 13.5) us / (14,336 - 4,096); 1,024 features take as long as 4,096"),
    scaled=ns(3500, f"{_SCALED_RUN}: 7.1, 8.7, 30.5 and 17.6 us for 8 rows, less the bytes (2.6 to 4.2 us)"),
)

H200: Final = Hardware(
    name="h200",
    vendor="nvidia",
    launch=ns(1402, _RUN_1),
    generated_norm=ns(574, f"{_RUN_1}; poorly determined (sigma over 100 %)"),
    cache=size(33.4e6, f"{_GPU_BENCHES}: fastest at a working set of 33.4 MB, memory's speed at twice that"),
    cache_bandwidth=rate(5868, f"{_RUN_1}, near 5810 of {_GPU_BENCHES}"),
    memory_bandwidth=rate(4301, f"datasheet, 4.8 TB/s, times 3002 / 3350 ({H100_COPY}, datasheet 3.35 TB/s)"),
    strided_copy=rate(2885, f"{_RUN_1}; poorly determined (sigma of 72 %)"),
    attention=H100_ATTENTION,
    linear=H200_LINEAR,
    library=HOPPER_LIBRARY,
    shots=HOPPER_SHOTS,
    engines=HOPPER_VLLM,
    triton=Peers(
        signal=ns(2220, f"{OURS} (each rank writes to all others, and spins on the data)"),
        second=ns(1265, OURS),
        step=ns(1922, OURS),
        bandwidth=rate(423.3, f"{OURS}, near 386 of its link_GB_s and 450 on paper"),
        mesh=False,
        stages=False,
    ),
    flashinfer=Peers(
        signal=ns(3451, f"{OURS} (Lamport: readers spin on the data)"),
        second=ns(15145, f"{OURS} (four ranks: two shots of FlashInfer take 30 us at least)"),
        step=ns(1314, OURS),
        bandwidth=rate(465.0, OURS),
        mesh=False,
        stages=False,
        buffered=3,
    ),
    errors=HOPPER_ERRORS,
)

_same_die = like("H200", "the same GH100 die, clocks and NVLink 4")
_H100_PLAIN: Final[dict[str, Any]] = {part: _same_die(getattr(H200, part)) for part in PLAIN}
H100: Final = replace(H200, name="h100", **{**_H100_PLAIN, "memory_bandwidth": rate(3002, H100_COPY)})

_unmeasured = like("H200", "not measured on B200")


def _b200(factor: float, why: str) -> Like:
    return lambda constant: scaled("H200", constant, factor, f"{why}; not measured on B200")


_sms = _b200(148 / 132, "SMs, 148 over 132")
_links = _b200(40.1 / 20.6, "SM100_NVLINK_BW over SM90_NVLINK_BW, 40.1 / 20.6 (NCCL 2.30, src/graph/topo.h)")
B200: Final = Hardware(
    name="b200",
    vendor="nvidia",
    launch=_unmeasured(H200.launch),
    generated_norm=_unmeasured(H200.generated_norm),
    cache=_b200(126 / 50, "L2 of 126 MB over 50 MB")(H200.cache),
    cache_bandwidth=_sms(H200.cache_bandwidth),
    memory_bandwidth=_b200(8.0 / 4.8, "datasheets, 8 over 4.8 TB/s")(H200.memory_bandwidth),
    strided_copy=_sms(H200.strided_copy),
    attention=derived(H100_ATTENTION, like("H100", "not measured on B200")),
    linear=derived(H200_LINEAR, like("H200", "not measured on B200")),
    library=BLACKWELL_LIBRARY,
    shots=BLACKWELL_SHOTS,
    engines=B200_VLLM,
    triton=H200.triton and derived(H200.triton, _unmeasured, bandwidth=_links),
    flashinfer=H200.flashinfer and derived(H200.flashinfer, _unmeasured, bandwidth=_links),
    errors=UNMEASURED_ERRORS,
)

_SMS, L2_BYTES = 132, 50e6
"""H200's SMs and bytes of L2."""
_PCIE = {4: 24.0, 5: 48.0}
"""GB/s of 16 lanes in one direction, by generation, as NCCL counts them."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Datasheet values of a GPU that wasn't measured for fuseplan.

    Attributes:
        source: the document.
        memory: GB/s.
        cache: bytes of L2.
        nvlink: times the bandwidth of H200's links, 18 of NVLink 4; None: it has none.
        pcie: the generation of its PCI Express.
        reaches_peers: whether a kernel can read and write another GPU's memory.
        low_latency: GB/s of NCCL's LL on one node.
        multicast: whether the switch between its links adds.
        engines: the all-reduces that engines call.
        errors: the model's.
    """

    source: str
    memory: float
    cache: float
    nvlink: float | None = None
    pcie: int = 4
    reaches_peers: bool = True
    low_latency: float = 141.0
    multicast: bool = False
    engines: Mapping[str, Dispatch] = field(default_factory=lambda: PAIR_VLLM)
    errors: Mapping[str, Error] = field(default_factory=lambda: UNMEASURED_ERRORS)

    def hardware(self, name: str, processors: int) -> Hardware:
        """The constants of a device of that name with so many streaming multiprocessors."""
        unmeasured = f"{self.source}; not measured on {name}"
        same = like("H200", f"not measured on {name}")

        def times(factor: float, why: str) -> Like:
            return lambda constant: scaled("H200", constant, factor, f"{why}; {unmeasured}")

        more = times(processors / _SMS, f"SMs, {processors} over {_SMS}")
        lanes = _PCIE[self.pcie]
        over_pcie = f"PCI Express {self.pcie}.0, 16 lanes, {lanes:g} GB/s (NCCL 2.30, src/graph/topo.h); {unmeasured}"
        links: Like = (
            times(self.nvlink, "NVLinks")
            if self.nvlink is not None
            else lambda constant: replace(constant, value=lanes, source=over_pcie)
        )

        def reached(of: Peers | None) -> Peers | None:
            return derived(of, same, bandwidth=links) if of is not None and self.reaches_peers else None

        paper = f"datasheet, {self.memory:g} GB/s, times 3002 / 3350 ({H100_COPY}); {unmeasured}"
        return Hardware(
            name=name,
            vendor="nvidia",
            launch=same(H200.launch),
            generated_norm=same(H200.generated_norm),
            cache=times(self.cache / L2_BYTES, f"L2 of {self.cache / 1e6:g} MB over 50 MB")(H200.cache),
            cache_bandwidth=more(H200.cache_bandwidth),
            memory_bandwidth=rate(round(self.memory * COPIED, 1), paper),
            strided_copy=more(H200.strided_copy),
            attention=derived(H100_ATTENTION, same),
            linear=derived(H200_LINEAR, same),
            library=tuple(self._protocol(each, same, links, unmeasured) for each in self._served()),
            shots=tuple(
                derived(each, same, bandwidth=links, peer=None if self.nvlink is not None else links)
                for each in H200.shots
                if self.reaches_peers and (self.multicast or each.algorithm != "multimem")
            ),
            engines=self.engines,
            triton=reached(H200.triton),
            flashinfer=reached(H200.flashinfer),
            errors=self.errors,
        )  # fmt: skip

    def _served(self) -> list[Protocol]:
        """The protocols that NCCL uses: LL128 and NVLS need NVLink."""
        only = ("LL128", "NVLS") if self.nvlink is None else () if self.multicast else ("NVLS",)
        return [each for each in H200.library if not each.name.endswith(only)]

    def _protocol(self, of: Protocol, same: Like, links: Like, unmeasured: str) -> Protocol:
        """NCCL's protocol on these links."""
        changed = derived(of, same, bandwidth=links)
        if of.name.endswith(" LL"):
            slowest = self.low_latency if self.nvlink is not None else min(_PCIE[self.pcie] / 2, self.low_latency)
            why = f"llMaxBws of {NCCL}, or half of the lanes where that is less; {unmeasured}"
            changed = replace(changed, bandwidth=rate(slowest, why))
        if self.nvlink is None:
            over_pcie = 1000 if of.name.endswith(" LL") else 5700
            changed = replace(changed, step=ns(over_pcie, f"{NCCL}: hwLatencies, PCI; {unmeasured}"))
        return changed


def _gpu(name: str, description: str, reported: str, processors: int, constants: Hardware | Sheet) -> DeviceProfile:
    hardware = constants.hardware(name, processors) if isinstance(constants, Sheet) else constants
    return DeviceProfile(
        name=name, vendor="nvidia", description=f"NVIDIA {description}", reported=(f"(NVIDIA )?{reported}",),
        processors=processors, hardware=hardware,
    )  # fmt: skip


_A100 = "NVIDIA A100 Tensor Core GPU datasheet (June 2021) and architecture whitepaper"
_A100_LINKS = 12 * 20.0 / (18 * 20.6)
_ADA = "NVIDIA Ada GPU Architecture whitepaper"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet and architecture whitepaper"
_GH200 = "NVIDIA GH200 Grace Hopper Superchip datasheet"
DEVICES: Final = (
    _gpu("a100", "A100 SXM, 80 GB", "A100-SXM4-80GB", 108,
         Sheet(source=_A100, memory=2039, cache=40e6, nvlink=_A100_LINKS, low_latency=87.7, engines=ANY_VLLM)),
    _gpu("a100-40gb", "A100 SXM, 40 GB", "A100-SXM4-40GB", 108,
         Sheet(source=_A100, memory=1555, cache=40e6, nvlink=_A100_LINKS, low_latency=87.7, engines=ANY_VLLM)),
    _gpu("a100-pcie", "A100 PCIe, 80 GB", "A100 80GB PCIe", 108,
         Sheet(source=_A100, memory=1935, cache=40e6, low_latency=87.7)),
    _gpu("a100-pcie-40gb", "A100 PCIe, 40 GB", "A100-PCIE-40GB", 108,
         Sheet(source=_A100, memory=1555, cache=40e6, low_latency=87.7)),
    _gpu("l40s", "L40S", "L40S", 142,
         Sheet(source=f"NVIDIA L40S datasheet and {_ADA}", memory=864, cache=96e6, low_latency=87.7)),
    _gpu("rtx4090", "GeForce RTX 4090", "GeForce RTX 4090", 128,
         Sheet(source=f"{_ADA}, GeForce RTX 4090", memory=1008, cache=72e6, reaches_peers=False,
               low_latency=87.7, engines={})),
    _gpu("h20-96gb", "H20, 96 GB", "H20", 78,
         Sheet(source="NVIDIA H20 datasheet", memory=4000, cache=60e6, nvlink=1.0, multicast=True,
               engines=HOPPER_VLLM)),
    _gpu("h100", "H100 SXM", "H100 80GB HBM3", 132, H100),
    _gpu("h100-pcie", "H100 PCIe", "H100 PCIe", 114, Sheet(source=_H100, memory=2000, cache=50e6, pcie=5)),
    _gpu("h100-nvl", "H100 NVL", "H100 NVL", 132,
         Sheet(source="NVIDIA H100 NVL datasheet", memory=3900, cache=50e6, pcie=5)),
    _gpu("h200", "H200 SXM", "H200", 132, H200),
    _gpu("gh200", "GH200, 96 GB", "GH200 480GB", 132,
         Sheet(source=_GH200, memory=4000, cache=50e6, nvlink=1.0, multicast=True, engines=HOPPER_VLLM,
               errors=HOPPER_ERRORS)),
    _gpu("gh200-144gb", "GH200, 144 GB", "GH200 144G HBM3e", 132,
         Sheet(source=_GH200, memory=4900, cache=50e6, nvlink=1.0, multicast=True, engines=HOPPER_VLLM,
               errors=HOPPER_ERRORS)),
    _gpu("b200", "B200", "B200", 148, B200),
    _gpu("b300", "B300 SXM", "B300 SXM6 AC", 148,
         replace(renamed(B200, "b300", "NVIDIA DGX B300 datasheet: 8 TB/s and NVLink 5, as B200", 8000),
                 engines=B300_VLLM)),
)  # fmt: skip
"""One record each."""
