"""Builds u2a_kernels._C (CPU kernels for three instruction sets, pybind11 shell) and _C_cuda.

U2A_BUILD=auto|cpu|cuda|none (auto: CUDA too when nvcc is found); U2A_CUDA_ARCHS="80 90a 100a+PTX".
Only libtorch's stable ABI is used, so the CUDA library also builds beside a CPU-only torch.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

MODE = os.environ.get("U2A_BUILD", "auto")
ARCHS = os.environ.get("U2A_CUDA_ARCHS", "80 90a 100a+PTX").split()
ISAS = {
    "base": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
}
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # libtorch 2.11


def cuda_home():
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    nvcc = shutil.which("nvcc")
    if not nvcc:
        return None
    dry = [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
    lines = subprocess.run(dry, capture_output=True, text=True).stderr.splitlines()
    tops = [line.split("=", 1)[1] for line in lines if line.startswith("#$ TOP=")]
    return Path(tops[0]) if tops else None


def gencodes():
    for arch in ARCHS:
        name = arch.removesuffix("+PTX")
        code = f"[sm_{name},compute_{name}]" if arch.endswith("+PTX") else f"sm_{name}"
        yield f"-gencode=arch=compute_{name},code={code}"


def extensions(home):
    import pybind11
    from torch.utils.cpp_extension import CppExtension

    host = ["-O3", "-g0", TARGET, "-DTORCH_STABLE_ONLY"]
    shell = [f'-DU2A_CUDA_ARCHS="{" ".join(ARCHS) if home else ""}"']
    cpu = [
        str(p)
        for p in Path("csrc").glob("*.cpp")
        if not p.name.endswith(("_simd.cpp", "_cuda.cpp"))
    ]
    common = {"include_dirs": [pybind11.get_include(), "csrc"]}
    exts = [CppExtension("u2a_kernels._C", sorted(cpu), extra_compile_args=host + shell, **common)]
    if home:
        libs = [home / d for d in ("lib64", "lib", "targets/x86_64-linux/lib")]
        lib = next(p for p in libs if (p / "libcudart_static.a").exists())
        exts.append(
            CppExtension(
                "u2a_kernels._C_cuda",
                sorted(str(p) for p in Path("csrc").glob("*_cuda.cpp")),
                include_dirs=["csrc", str(home / "include")],
                library_dirs=[str(lib)],
                libraries=["cudart_static", "dl", "rt", "pthread"],
                extra_compile_args=[*host, "-DUSE_CUDA"],
            )
        )
    return exts


def build_command(home):
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext):
            """Objects that need flags of their own are compiled here, then linked in."""
            out = Path(self.build_temp)
            out.mkdir(parents=True, exist_ok=True)
            jobs = {}
            if ext.name.endswith("._C"):
                cxx = [
                    os.environ.get("CXX", "g++"),
                    "-std=c++17",
                    "-O3",
                    "-fPIC",
                    "-ffp-contract=off",
                ]
                for src in sorted(Path("csrc").glob("*_simd.cpp")):
                    for isa, flags in ISAS.items():
                        obj = out / f"{src.stem}.{isa}.o"
                        jobs[obj] = [
                            *cxx,
                            *flags,
                            f"-DU2A_ISA={isa}",
                            "-Icsrc",
                            "-c",
                            src,
                            "-o",
                            obj,
                        ]
            else:
                nvcc = [home / "bin/nvcc", "-std=c++17", "-O3", "--threads", "0", "-lineinfo"]
                nvcc += ["-Xcompiler", "-fPIC", "-Xptxas", "-v", *gencodes()]
                for src in sorted(Path("csrc").glob("*.cu")):
                    obj = out / f"{src.stem}.cu.o"
                    jobs[obj] = [*nvcc, "-c", src, "-o", obj]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda c: subprocess.run([*map(str, c)], check=True), jobs.values()))
            ext.extra_objects += [str(o) for o in jobs]
            super().build_extension(ext)

    return Build


if MODE not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"U2A_BUILD: want auto, cpu, cuda or none, got {MODE!r}")
if MODE == "none":
    setup()
else:
    HOME = cuda_home() if MODE in ("auto", "cuda") else None
    if MODE == "cuda" and not HOME:
        raise SystemExit("U2A_BUILD=cuda: no nvcc on PATH and CUDA_HOME is not set")
    print(f"u2a-kernels: U2A_BUILD={MODE}: CPU kernels{f' and CUDA for {ARCHS}' if HOME else ''}")
    setup(ext_modules=extensions(HOME), cmdclass={"build_ext": build_command(HOME)})
