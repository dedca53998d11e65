"""The runtimes that take part by default, each with the fastest settings that its documentation names.

All of them get the same ONNX file, with fixed shapes and as many threads as the others. Inputs are handed over once and
outputs are left where the runtime puts them, so that no call copies to or from NumPy.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tvm_nm.peers.registry import Job, Run, peer

__all__ = ["OURS", "artefact"]

OURS = "tvm_nm"
"""The name of this project among the runtimes."""


def _compile(job: Job) -> None:
    # Nothing is pruned here: the zeros are those of the ONNX file, which every other runtime gets as well.
    import tvm_nm

    tvm_nm.compile(job.model, output=artefact(job), pattern="dense", threads=job.threads)


def artefact(job: Job) -> Path:
    """Return where this project's build of a model is."""
    return job.folder / f"threads-{job.threads}"


@peer(OURS, packages=["tvm-nm", "apache-tvm"], prepare=_compile, per_thread_count=True)
def load_tvm_nm(job: Job) -> Run:
    """Return the artefact's main function, called as TVM's virtual machine calls it."""
    import tvm

    from tvm_nm.runtime import load, use_threads

    model = load(artefact(job), threads=job.threads)
    main = model.virtual_machine()["main"]
    arguments = [tvm.runtime.tensor(job.inputs[spec.name]) for spec in model.inputs]

    def run() -> list[Any]:
        use_threads(job.threads)
        outputs = main(*arguments)
        return [outputs] if isinstance(outputs, tvm.runtime.Tensor) else list(outputs)

    return run


@peer("onnxruntime", packages=["onnxruntime"])
def load_onnxruntime(job: Job) -> Run:
    """Its default settings, with bound inputs and outputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(str(job.model), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in job.inputs.items():
        binding.bind_cpu_input(name, array)
    for name in job.outputs:
        binding.bind_output(name)

    def run() -> list[Any]:
        session.run_with_iobinding(binding)
        return list(binding.get_outputs())

    return run


@peer("openvino", packages=["openvino"])
def load_openvino(job: Job) -> Run:
    """float32 forced: its default computes in bfloat16 where the processor has it."""
    return _openvino(job, {"INFERENCE_PRECISION_HINT": "f32"})


@peer("openvino-default", packages=["openvino"], precision="its default")
def load_openvino_default(job: Job) -> Run:
    """Whatever precision it likes, which is not float32 on processors with bfloat16 units."""
    return _openvino(job, {})


def _openvino(job: Job, settings: dict[str, str]) -> Run:
    # Importing it reports the import to its makers; without this package it uses a stub instead.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(job.threads), **settings}
    compiled = core.compile_model(core.read_model(str(job.model)), "CPU", settings)
    request = compiled.create_infer_request()
    for name, array in job.inputs.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def run() -> list[Any]:
        request.infer()
        return [request.get_tensor(name).data for name in job.outputs]

    return run


def _pnnx(job: Job) -> None:
    """Convert to ncnn's format and to a PyTorch module; pnnx writes both."""
    link = job.folder / "model.onnx"
    link.unlink(missing_ok=True)
    link.symlink_to(job.model.resolve())
    shapes = ",".join(f"[{','.join(map(str, array.shape))}]" for array in job.inputs.values())
    # Not through the package, which would import torch only to start the program beside it.
    spec = importlib.util.find_spec("pnnx")
    if spec is None or spec.origin is None:
        raise RuntimeError("pnnx is not installed")
    command = [str(Path(spec.origin).with_name("pnnx")), link.name, f"inputshape={shapes}", "fp16=0"]
    done = subprocess.run(command, cwd=job.folder, capture_output=True, text=True, errors="replace")
    (job.folder / "pnnx.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    # By-products of the weights' size that nobody reads.
    for name in ("model.pnnx.onnx", "model.pnnxsim.onnx"):
        (job.folder / name).unlink(missing_ok=True)
    if done.returncode or not (job.folder / "model.ncnn.bin").is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"pnnx cannot convert it: {last[0]}")


def _torch_module(job: Job) -> Any:
    import torch

    torch.set_num_threads(job.threads)
    with contextlib.suppress(RuntimeError):  # it can be set once, and only before the first parallel work
        torch.set_num_interop_threads(1)
    spec = importlib.util.spec_from_file_location("pnnx_module", job.folder / "model_pnnx.py")
    if spec is None or spec.loader is None:
        raise RuntimeError("pnnx wrote no PyTorch module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = Path.cwd()
    os.chdir(job.folder)  # the module finds its weights by their bare name
    try:
        return module.Model().float().eval().requires_grad_(False)
    finally:
        os.chdir(before)


@peer("torch", packages=["torch", "pnnx"], prepare=_pnnx)
def load_torch(job: Job) -> Run:
    """Traced, frozen and optimised for inference: oneDNN with weights packed once. Eager mode takes twice as long."""
    import torch

    inputs = [torch.from_numpy(array) for array in job.inputs.values()]
    model = torch.jit.freeze(torch.jit.trace(_torch_module(job), inputs))
    return _torch_run(torch.jit.optimize_for_inference(model), inputs)


@peer("torch-inductor", packages=["torch", "pnnx"], prepare=_pnnx, optional=True)
def load_torch_inductor(job: Job) -> Run:
    """Compiled with frozen weights. Needs a C++ compiler, and about a minute for a network."""
    import torch
    import torch._inductor.config as inductor

    inductor.freezing = True
    model = torch.compile(_torch_module(job), fullgraph=True)
    return _torch_run(model, [torch.from_numpy(array) for array in job.inputs.values()])


def _torch_run(model: Any, inputs: list[Any]) -> Run:
    import torch

    def run() -> list[Any]:
        with torch.inference_mode():
            outputs = model(*inputs)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    return run


@peer("ncnn", packages=["ncnn", "pnnx"], prepare=_pnnx)
def load_ncnn(job: Job) -> Run:
    """float32 storage and arithmetic, Winograd and SGEMM convolutions as it chooses."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = job.threads
    for half in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{half}", False)
    if net.load_param(str(job.folder / "model.ncnn.param")) or net.load_model(str(job.folder / "model.ncnn.bin")):
        raise RuntimeError("ncnn cannot load what pnnx wrote")
    inputs = [_ncnn_mat(ncnn, array) for array in job.inputs.values()]

    def run() -> list[Any]:
        outputs = []
        with net.create_extractor() as extractor:
            for index, mat in enumerate(inputs):
                extractor.input(f"in{index}", mat)
            for index in range(len(job.outputs)):
                status, mat = extractor.extract(f"out{index}")
                if status:
                    raise RuntimeError(f"ncnn fails with code {status}")
                outputs.append(mat)
        return outputs

    return run


def _ncnn_mat(ncnn: Any, array: np.ndarray[Any, Any]) -> Any:
    # Feature maps have no batch axis in ncnn; a matrix of feature vectors is a 2-D blob as it stands.
    if array.ndim == 4:
        if len(array) != 1:
            raise RuntimeError("ncnn runs one image at a time")
        array = array[0]
    elif array.ndim == 2 and len(array) == 1:
        array = array[0]
    return ncnn.Mat(array).clone()


def _mnn_convert(job: Job) -> None:
    # The converter itself: the command `mnnconvert` is a wrapper that installs a package which reports its use.
    import _tools

    target = job.folder / "model.mnn"
    _tools.mnnconvert(
        ["mnnconvert", "-f", "ONNX", "--modelFile", str(job.model), "--MNNModel", str(target), "--bizCode", "bench"]
    )
    if not target.is_file():
        raise RuntimeError("MNN's converter wrote nothing")


@peer("mnn", packages=["mnn"], prepare=_mnn_convert)
def load_mnn(job: Job) -> Run:
    """High precision, which is float32."""
    import MNN
    from MNN import expr

    settings = {"backend": 0, "precision": "high", "memory": "normal", "power": "high", "numThread": job.threads}
    manager = MNN.nn.create_runtime_manager((settings,))
    names = list(job.inputs)
    module = MNN.nn.load_module_from_file(
        str(job.folder / "model.mnn"), names, list(job.outputs), runtime_manager=manager, shape_mutable=False
    )
    inputs = []
    for array in job.inputs.values():
        tensor = expr.placeholder(list(array.shape), expr.NCHW)
        tensor.write(np.ascontiguousarray(array))
        inputs.append(tensor)

    def run() -> list[Any]:
        # Reading an output is what makes MNN compute it.
        return [expr.convert(output, expr.NCHW).read() for output in module.forward(inputs)]

    return run
