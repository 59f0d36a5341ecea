"""A CPU for verl's workers, through verl's own registries: VERL_USE_EXTERNAL_MODULES loads it."""

from __future__ import annotations

import torch
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformCUDA):
    """What a worker of verl asks of its device, where that is the CPU."""

    device_name = "cpu"
    vendor_name = "cpu"

    class device_module:  # stands for torch.cuda
        synchronize = empty_cache = staticmethod(lambda *_: None)
        max_memory_allocated = max_memory_reserved = staticmethod(lambda: 0)
        memory_allocated = memory_reserved = staticmethod(lambda: 0)
        mem_get_info = staticmethod(lambda: (0, 0))
        is_available = staticmethod(lambda: False)

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def communication_backend_name(self) -> str:
        return "gloo"

    def ray_resource_name(self) -> str:
        return "CPU"


# They ask for the platform when they are imported.
from verl.single_controller.base.decorator import Dispatch, register  # noqa: E402
from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: E402

from stepcredit.integrations.verl import ScoringWorker  # noqa: E402

EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device=["cpu"])(FSDPEngineWithLMHead)


class WorkerOnCPU(ScoringWorker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        # verl would ask for one backend for the CPU and one for the device, which torch refuses for the same one.
        torch.distributed.init_process_group("gloo")
        return super().init_model()
