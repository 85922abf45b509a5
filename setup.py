"""Builds u2a_kernels._C (CPU kernels for three instruction sets, pybind11 shell) and _C_cuda.

U2A_BUILD=auto|cpu|cuda|none (auto: CUDA too when nvcc works); U2A_CUDA_ARCHS="80 90a 100a+PTX".
Only libtorch's stable ABI is used, so the CUDA library also builds beside a CPU-only torch.
"""

import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from setuptools import setup

MODE = os.environ.get("U2A_BUILD", "auto")
ARCHS = os.environ.get("U2A_CUDA_ARCHS", "80 90a 100a+PTX").split()
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma"
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = {"base": "", "avx2": "-mavx2 -mfma" if X86 else "", "avx512": AVX512 if X86 else ""}
HOST = "-O3 -g0 -DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION=0x020b000000000000".split()  # 2.11
SIMD = "-std=c++17 -O3 -fPIC -ffp-contract=off -fno-trapping-math -Icsrc".split()


def sources(pattern):
    return sorted(str(p) for p in Path("csrc").glob(pattern))


def cuda():
    """nvcc's command line, toolkit folder and version, proved by a trial compile."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if not nvcc:
        raise RuntimeError(f"no bin/nvcc in CUDA_HOME={home}" if home else "no nvcc on PATH")
    nvcc = [nvcc, *"-std=c++17 -O3 --threads 0 -lineinfo -Xcompiler -fPIC -Icsrc".split()]
    for arch in ARCHS:
        name = arch.removesuffix("+PTX")
        code = f"[sm_{name},compute_{name}]" if arch.endswith("+PTX") else f"sm_{name}"
        nvcc.append(f"-gencode=arch=compute_{name},code={code}")
    with tempfile.TemporaryDirectory() as tmp:
        trial = Path(tmp, "trial.cu")
        trial.write_text("#include <cuda_runtime.h>\n__global__ void trial() {}\n")
        command = [*nvcc, "-v", "-c", trial, "-o", f"{trial}.o"]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    facts = dict(re.findall(r"(?:#\$ |-D)(TOP|__CUDACC_VER_M\w+__)=(\S+)", done.stdout))
    if done.returncode or "TOP" not in facts:
        said = [line for line in done.stdout.splitlines() if not line.startswith("#$")]
        raise RuntimeError(f"{nvcc[0]} cannot compile for {ARCHS}: {(said or ['no reason'])[0]}")
    version = ".".join(facts[f"__CUDACC_VER_{part}__"] for part in ("MAJOR", "MINOR"))
    return nvcc, Path(facts["TOP"]), version


def extensions(home, version):
    import pybind11
    from torch.utils.cpp_extension import CppExtension

    facts = {"ARCHS": " ".join(ARCHS) if version else "", "TOOLKIT": version}
    defines = [f'-DU2A_CUDA_{name}="{value}"' for name, value in facts.items()]
    cpu = [s for s in sources("*.cpp") if not s.endswith(("_simd.cpp", "_cuda.cpp"))]
    args = dict(include_dirs=[pybind11.get_include(), "csrc"], extra_compile_args=HOST + defines)
    yield CppExtension("u2a_kernels._C", cpu, **args)
    if version:
        yield CppExtension(
            "u2a_kernels._C_cuda",
            sources("*_cuda.cpp"),
            include_dirs=["csrc", str(home / "include")],
            library_dirs=[str(home / d) for d in ("lib64", "lib", "targets/x86_64-linux/lib")],
            libraries=["cudart_static", "dl", "rt", "pthread"],
            extra_compile_args=[*HOST, "-DUSE_CUDA"],
        )


def build_command(nvcc):
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext):
            """Objects that need a compiler or flags of their own are made here, then linked in."""
            out = Path(self.build_temp)
            out.mkdir(parents=True, exist_ok=True)
            jobs = {}
            if ext.name.endswith("_cuda"):
                for src in sources("*.cu"):
                    jobs[f"{out / Path(src).stem}.cu.o"] = [*nvcc, "-c", src]
            else:
                for src, isa in product(sources("*_simd.cpp"), ISAS):
                    cxx = [*os.environ.get("CXX", "g++").split(), *SIMD, *ISAS[isa].split()]
                    jobs[f"{out / Path(src).stem}.{isa}.o"] = [*cxx, f"-DU2A_ISA={isa}", "-c", src]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda o: subprocess.run([*jobs[o], "-o", o], check=True), jobs))
            ext.extra_objects += list(jobs)
            super().build_extension(ext)

    return Build


if MODE not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"U2A_BUILD: want auto, cpu, cuda or none, got {MODE!r}")
if MODE == "none":
    print("u2a-kernels: U2A_BUILD=none: nothing compiled, the plain-torch references serve")
    setup()
else:
    nvcc, home, version = None, None, ""
    what = "CUDA not asked for"
    if MODE != "cpu":
        try:
            nvcc, home, version = cuda()
            what = f"CUDA {version} for {' '.join(ARCHS)}"
        except RuntimeError as why:
            if MODE == "cuda":
                raise SystemExit(f"U2A_BUILD=cuda: {why}") from None
            what = f"no CUDA kernels: {why}"
    print(f"u2a-kernels: U2A_BUILD={MODE}: C++ for {'/'.join(ISAS)}; {what}", flush=True)
    commands = {"build_ext": build_command(nvcc)}
    setup(ext_modules=list(extensions(home, version)), cmdclass=commands)
