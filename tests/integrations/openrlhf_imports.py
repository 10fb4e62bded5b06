"""Stand-ins for OpenRLHF's imports that need a GPU and that no test calls."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from typing import Any

# No kernels of DeepSpeed's; `compute_entropy` as it is written, not compiled.
os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def stand_in(name: str, **names: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []  # type: ignore[attr-defined]
    vars(module).update(names)
    sys.modules.setdefault(name, module)


# flash-attn is built with nvcc, vLLM wants a device.
stand_in("flash_attn")
stand_in(
    "flash_attn.bert_padding",
    index_first_axis=None,
    pad_input=None,
    rearrange=None,
    unpad_input=None,
)
stand_in("flash_attn.utils")
stand_in("flash_attn.utils.distributed", all_gather=None)
stand_in("vllm")
stand_in("vllm.inputs", TokensPrompt=None)
stand_in("vllm.utils", random_uuid=None)
