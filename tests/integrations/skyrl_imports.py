"""Stand-ins for what importing SkyRL's modules needs and Python 3.11 without a GPU has not."""

from __future__ import annotations

import importlib
import sys
import types
import typing

import typing_extensions

# Pydantic asks for this TypedDict before Python 3.12, which SkyRL wants.
_own = typing.TypedDict
setattr(typing, "TypedDict", typing_extensions.TypedDict)  # noqa: B010
importlib.import_module("skyrl.tinker.types")
setattr(typing, "TypedDict", _own)  # noqa: B010

# Built with nvcc; nothing here removes padding. "flash_attn" itself stays missing, because
# SkyRL takes its cross-entropy where it is there.
sys.modules["flash_attn.bert_padding"] = types.ModuleType("flash_attn.bert_padding")
vars(sys.modules["flash_attn.bert_padding"]).update(pad_input=None, unpad_input=None)
