"""Known GPUs: their memory and peak speed, for `plan` and for the MFU of a training step. From tables of others."""

import re
from typing import NamedTuple


class GPU(NamedTuple):
    """One kind of GPU."""

    device: str  # regular expression for the name that the driver gives it
    memory: int  # bytes; its data sheet's GB are taken as 10^9 bytes
    tflops: float  # peak in bfloat16, dense, accumulated in float32; for sparse matrices data sheets give twice as much
    source: str  # NVIDIA's document that those tables name; compare it before you rely on a figure


GB = 10**9
GPUS = {  # name -> GPU; of several that match a device the first is used
    "rtx-3090": GPU(r"RTX 3090$", 24 * GB, 71, "Ampere GA102 whitepaper"),
    "rtx-4090": GPU(r"RTX 4090$", 24 * GB, 165.2, "Ada architecture whitepaper"),
    "rtx-5090": GPU(r"RTX 5090$", 32 * GB, 209.5, "RTX Blackwell architecture whitepaper"),
    "l4": GPU(r"\bL4$", 24 * GB, 121, "L4 data sheet"),
    "l40s": GPU(r"\bL40S$", 48 * GB, 362, "L40S data sheet"),
    "a100-40": GPU(r"\bA100\b.*\b40GB\b", 40 * GB, 312, "A100 data sheet"),
    "a100-80": GPU(r"\bA100\b", 80 * GB, 312, "A100 data sheet"),
    "h100-pcie": GPU(r"\bH100 PCIe\b", 80 * GB, 756, "H100 data sheet"),
    "h100-nvl": GPU(r"\bH100 NVL\b", 94 * GB, 835, "H100 data sheet"),
    "h100": GPU(r"\bH100\b", 80 * GB, 989, "H100 data sheet"),
    "h200-nvl": GPU(r"\bH200 NVL\b", 141 * GB, 836, "H200 data sheet"),
    "h200": GPU(r"\bH200\b", 141 * GB, 989, "H200 data sheet"),
    "b200": GPU(r"\bB200\b", 180 * GB, 2250, "HGX B200 data sheet"),
}


def find_gpu(device_name: str) -> GPU | None:
    """The GPU with this name of the driver, such as "NVIDIA H100 80GB HBM3". None for others, and for parts of one (MIG)."""
    matches = (gpu for gpu in GPUS.values() if re.search(gpu.device, device_name))
    return None if re.search(r"\bMIG\b", device_name) else next(matches, None)
