# SPDX-License-Identifier: Apache-2.0
"""flash_attention on NVIDIA GPUs: sm90.py and sm90_backward.py for Hopper, sm80.py for Ampere and Ada.

The type of the config decides which one runs; without one, the device (`config.kinds`). sm80.py runs on Hopper too if
it is asked for.
"""

from pallas_kernels.core import device as device_lib
from pallas_kernels.core.device import Device
from pallas_kernels.core.dispatch import Call, Refusal
from pallas_kernels.flash_attention.config import Sm80Config, Sm90Config
from pallas_kernels.flash_attention.mosaic_gpu import sm80
from pallas_kernels.flash_attention.xla import Gradients


def supports(call: Call, device: Device) -> Refusal | None:
    return sm80.supports(call, device)


def forward(*arguments, config: Sm80Config | Sm90Config, **options):
    """As `xla.forward`."""
    if isinstance(config, Sm80Config):
        return sm80.forward(*arguments, config=config, **options)
    from pallas_kernels.flash_attention.mosaic_gpu import sm90

    return sm90.forward(*arguments, config=config, num_sms=_num_sms(), **options)


def backward(*arguments, config: Sm80Config | Sm90Config, **options) -> Gradients:
    """As `xla.backward`."""
    if isinstance(config, Sm80Config):
        return sm80.backward(*arguments, config=config, **options)
    from pallas_kernels.flash_attention.mosaic_gpu import sm90_backward

    return sm90_backward.backward(*arguments, config=config, num_sms=_num_sms(), **options)


def _num_sms() -> int:
    return device_lib.current().num_cores or 132
