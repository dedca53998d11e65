"""Fine-tuning of pruned networks with PyTorch: the extra ``torch``.

An ONNX model becomes a PyTorch module whose pruned weights stay zero, is trained, and goes back into the same ONNX
graph. It is the only part of the package that needs PyTorch.
"""

from __future__ import annotations

from tvm_nm.errors import EnvironmentMismatchError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise EnvironmentMismatchError(
        f"fine-tuning needs PyTorch ({error}): pip install 'tvm-nm[torch]'; for the smaller build without CUDA install "
        "torch from PyTorch's CPU index first"
    ) from error

from tvm_nm.torch.data import Augmentation
from tvm_nm.torch.finetune import FineTuned, finetune_file
from tvm_nm.torch.gradual import Phase, gradual_phases
from tvm_nm.torch.importer import import_model
from tvm_nm.torch.masks import WeightMasks
from tvm_nm.torch.model import TorchModel
from tvm_nm.torch.network_stage import reconstruct_network
from tvm_nm.torch.objective import Objective
from tvm_nm.torch.options import TrainingOptions
from tvm_nm.torch.training import Epoch, Status, Trained, train

__all__ = [
    "Augmentation",
    "Epoch",
    "FineTuned",
    "Objective",
    "Phase",
    "Status",
    "TorchModel",
    "Trained",
    "TrainingOptions",
    "WeightMasks",
    "finetune_file",
    "gradual_phases",
    "import_model",
    "reconstruct_network",
    "train",
]
