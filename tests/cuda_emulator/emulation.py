"""Builds the emulator with the CUDA kernels in it, and calls it with tensors as a backend is called."""

import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
FOLDER = Path(__file__).parent
SANITIZE = "CAMKERNELS_EMULATOR_SANITIZE"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64)
MISTAKES = (
    "none",
    "no_barrier",
    "no_cluster_barrier",
    "diverging_barriers",
    "thread_leaves_early",
    "part_of_a_warp_shuffles",
    "beyond_the_end",
    "waits_without_arriving",
    "arrives_twice",
    "never_waits",
    "reads_between_arrive_and_wait",
    "reads_before_the_atomic",
    "never_writes",
)
_Pointer, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_F32, _F64, _Bool = ctypes.c_float, ctypes.c_double, ctypes.c_bool


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def sampled(cases: Iterable[_T], step: int) -> list[_T]:
    """All cases; under the sanitizers, several times slower, a part of them."""
    return list(cases)[:: step if SANITIZE in os.environ else 1]


def build(folder: Path, sanitize: bool) -> Path:
    """The shared library; sanitized, it wants the sanitizer's runtime loaded before Python starts."""
    library = folder / ("emulator_sanitized.so" if sanitize else "emulator.so")
    found = compiler()
    assert found is not None
    # With more optimisation compiling takes longer by more than the tests then take less.
    sanitizers = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    mode = sanitizers if sanitize else ["-O1"]
    flags = ["-std=c++20", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    sources = [f"-I{FOLDER}", str(FOLDER / "driver.cpp"), "-o", str(library)]
    subprocess.run([found, *mode, *flags, "-DCAMKERNELS_EMULATOR", *sources], check=True)
    return library


def built(folder: Path, sanitize: bool) -> Path:
    """The library of this test run, whose temporary folder is given: of all of xdist's workers together."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / ("emulator_sanitized" if sanitize else "emulator")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be building it
        done = folder / "done"
        if not done.exists():
            done.write_text(str(build(folder, sanitize)))
        return Path(done.read_text())


def sanitizer_runtimes() -> list[str]:
    """What to preload so that a plain Python can load the sanitized library; empty if there is none."""
    found = compiler()
    if found is None:
        return []
    paths = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [found, f"-print-file-name={name}"]
        answer = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if not Path(answer).is_absolute():
            return []
        paths.append(str(Path(answer).resolve()))
    return paths


class _Struct(ctypes.Structure):
    """A C++ struct of plain members, given as keywords; the rest is zero."""


def _struct(name: str, **members: Any) -> type[ctypes.Structure]:
    return type(name, (_Struct,), {"_fields_": list(members.items())})


_Setting = _struct("Setting", seed=_I64, threads=_I32, cluster=_I32, vectors=_I32, shared_limit=_I32)
_Array = _struct("AnyArray", data=_Pointer, dtype=_I32)
_Front = _struct(
    "CamFront",
    features=_Pointer,
    weight=_Array,
    target=_Array,
    cam=_Pointer,
    cam32=_Pointer,
    extent=_Pointer,
    images=_I64,
    classes=_I64,
    channels=_I32,
    height=_I32,
    width=_I32,
    maps=_I32,
    eps=_F32,
    features_dtype=_I32,
    channels_last=_Bool,
    vectors=_Bool,
    rows=_I32,
)
_CamFwd = _struct("CamFwd", front=_Front, bias=_Array, normalize=_Bool)
_CamBwd = _struct(
    "CamBwd",
    grad_cam=_Array,
    features=_Pointer,
    weight=_Array,
    target=_Array,
    cam=_Pointer,
    extent=_Pointer,
    grad_features=_Pointer,
    grad_weight=_Pointer,
    grad_bias=_Pointer,
    scratch=_Pointer,
    images=_I64,
    classes=_I64,
    channels=_I32,
    height=_I32,
    width=_I32,
    maps=_I32,
    eps=_F32,
    features_dtype=_I32,
    channels_last=_Bool,
    normalize=_Bool,
    vectors=_Bool,
    rows=_I32,
    share=_I32,
)
_Erasing = _struct(
    "Erasing",
    images=_I64,
    depth=_I32,
    image_height=_I32,
    image_width=_I32,
    map_height=_I32,
    map_width=_I32,
    threshold=_F32,
    sharpness=_F32,
    scale_y=_F32,
    scale_x=_F32,
    dtype=_I32,
    nearest=_Bool,
    channels_last=_Bool,
    vectors=_Bool,
    fills=_I32,
    fill=_F32 * 16,
    fill_bits=ctypes.c_uint32 * 16,
)
_CamEraseFwd = _struct("CamEraseFwd", front=_Front, erasing=_Erasing, images=_Pointer, erased=_Pointer)
_CamEraseBwd = _struct(
    "CamEraseBwd",
    erasing=_Erasing,
    grad_erased=_Pointer,
    images=_Pointer,
    cam=_Pointer,
    grad_cam=_Array,
    grad_images=_Pointer,
    grad_map=_Pointer,
    strips=_I32,
    tile_rows=_I32,
)


_Axis = _struct("Axis", step=_I64, offset=_I64, fraction=_F64, begin=_I64, end=_I64)
_Geometry = _struct(
    "Geometry",
    affine=_Bool,
    transposed=_Bool,
    rows=_Axis,
    columns=_Axis,
    height=_I32,
    width=_I32,
    height_t=_I32,
    width_t=_I32,
)
_CamTransform = _struct(
    "CamTransform",
    features=_Pointer,
    features_t=_Pointer,
    weight=_Array,
    matrix=_Array,
    geometry=_Geometry,
    images=_I64,
    classes=_I64,
    matrices=_I64,
    channels=_I32,
    comparison=_I32,
    features_dtype=_I32,
    channels_last=_Bool,
    channels_last_t=_Bool,
)
_CommonGrid = _struct(
    "CommonGrid",
    one=_I32 * 2,
    other=_I32 * 2,
    height=_I32,
    width=_I32,
    scale_y=_F32,
    scale_x=_F32,
    scale_y_other=_F32,
    scale_x_other=_F32,
    copies=_Bool,
    copies_other=_Bool,
)
_MapPlan = _struct("MapPlan", tiling=_I32 * 3, labels=_I32)
_CamTransformMseFwd = _struct(
    "CamTransformMseFwd",
    maps=_CamTransform,
    grid=_CommonGrid,
    means=_Pointer,
    kept=_Pointer,
    plan=_MapPlan,
)
_CamTransformMseBwd = _struct(
    "CamTransformMseBwd",
    maps=_CamTransform,
    grid=_CommonGrid,
    grad_means=_Pointer,
    kept=_Pointer,
    grad_features=_Pointer,
    grad_features_t=_Pointer,
    grad_weight=_Pointer,
    scratch=_Pointer,
    transpose=_Pointer * 3,
    slopes=_Pointer,
    plan=_MapPlan,
    spread=_I32,
    tiles_t=_I32,
    tiles=_I32,
)
_CamSeedsFwd = _struct(
    "CamSeedsFwd",
    front=_Front,
    seed_features=_Pointer,
    noise=_Pointer,
    vectors=_Pointer,
    indices=_Pointer,
    count=_Pointer,
    scratch=_Pointer,
    num_seeds=_I32,
    depth=_I32,
    threshold=_F32,
    seeds_dtype=_I32,
    seeds_channels_last=_Bool,
    seed_vectors=_Bool,
    places=_I32,
)
_CamSeedsBwd = _struct(
    "CamSeedsBwd",
    grad_vectors=_Pointer,
    indices=_Pointer,
    grad_seed_features=_Pointer,
    images=_I64,
    num_seeds=_I32,
    depth=_I32,
    height=_I32,
    width=_I32,
    dtype=_I32,
    channels_last=_Bool,
    add=_Bool,
)
_VectorGroups = _struct(
    "VectorGroups",
    vectors=_Pointer,
    order=_Pointer,
    begin=_Pointer,
    end=_Pointer,
    images=_I64,
    num_seeds=_I32,
    depth=_I32,
    dtype=_I32,
    squared=_Bool,
)
_StochasticConsistencyFwd = _struct("StochasticConsistencyFwd", groups=_VectorGroups, sums=_Pointer)
_StochasticConsistencyBwd = _struct(
    "StochasticConsistencyBwd", groups=_VectorGroups, scale=_Pointer, grad_vectors=_Pointer
)
_OtsuMaskFwd = _struct(
    "OtsuMaskFwd",
    maps=_Pointer,
    mask=_Pointer,
    threshold=_Pointer,
    count=_I64,
    pixels=_I64,
    bins=_I32,
    dtype=_I32,
)
_MaskedMaxPoolFwd = _struct(
    "MaskedMaxPoolFwd",
    features=_Pointer,
    mask=_Pointer,
    pooled=_Pointer,
    index=_Pointer,
    images=_I64,
    channels=_I32,
    height=_I32,
    width=_I32,
    dtype=_I32,
    channels_last=_Bool,
    vectors=_Bool,
    lanes=_I32,
)
_MaskedMaxPoolBwd = _struct(
    "MaskedMaxPoolBwd",
    grad=_Pointer,
    mask=_Pointer,
    index=_Pointer,
    grad_features=_Pointer,
    images=_I64,
    channels=_I32,
    height=_I32,
    width=_I32,
    dtype=_I32,
    channels_last=_Bool,
    vectors=_Bool,
)
# By op, in the order of the driver's emulator_sizes.
_CALLS = {
    "cam_fwd": _CamFwd,
    "cam_bwd": _CamBwd,
    "cam_erase_fwd": _CamEraseFwd,
    "cam_erase_bwd": _CamEraseBwd,
    "cam_transform_mse_fwd": _CamTransformMseFwd,
    "cam_transform_mse_bwd": _CamTransformMseBwd,
    "cam_seeds_fwd": _CamSeedsFwd,
    "cam_seeds_bwd": _CamSeedsBwd,
    "stochastic_consistency_fwd": _StochasticConsistencyFwd,
    "stochastic_consistency_bwd": _StochasticConsistencyBwd,
    "otsu_mask_fwd": _OtsuMaskFwd,
    "masked_max_pool_fwd": _MaskedMaxPoolFwd,
    "masked_max_pool_bwd": _MaskedMaxPoolBwd,
}


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _array(tensor: Tensor | None) -> ctypes.Structure:
    return _Array(data=_pointer(tensor), dtype=0 if tensor is None else _DTYPES.index(tensor.dtype))


def _channels_last(tensor: Tensor) -> bool:
    return tensor.shape[1] > 1 and tensor.stride(1) == 1


class Shape(NamedTuple):
    """Of a launch."""

    blocks: int
    threads: int
    cluster: int
    shared: int


@dataclass
class Emulator:
    """Launchers with the names and arguments of the ops, as ``camkernels.triton`` has them."""

    library: ctypes.CDLL
    threads: int = 64
    cluster: int = 1
    vectors: bool = True
    seed: int = 0
    shared_limit: int = 227 << 10  # as on sm_90
    launches: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)  # of each op's last launch

    @staticmethod
    def load(path: Path) -> "Emulator":
        library = ctypes.CDLL(str(path))
        library.emulator_error.restype = ctypes.c_char_p
        for name in (*_CALLS, "reverse", "block_sums", "histogram", "tally", "launch"):
            getattr(library, f"emulate_{name}").restype = _I64
        sizes = (_I64 * len(_CALLS))()
        library.emulator_sizes(sizes)
        mirrored = [ctypes.sizeof(struct) for struct in _CALLS.values()]
        assert list(sizes) == mirrored, "the parameter structs here are not those of csrc/cuda"
        return Emulator(library)

    @contextmanager
    def on(self, **settings: Any) -> Iterator["Emulator"]:
        before = {name: getattr(self, name) for name in settings}
        for name, value in settings.items():
            setattr(self, name, value)
        try:
            yield self
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def _setting(self) -> ctypes.Structure:
        return _Setting(
            seed=self.seed,
            threads=self.threads,
            cluster=self.cluster,
            vectors=self.vectors,
            shared_limit=self.shared_limit,
        )

    def _call(self, name: str, call: ctypes.Structure, outputs: list[Tensor], *rest: Any) -> None:
        for output in outputs:
            # What a kernel forgets to write must show.
            if output.dtype == torch.bool:
                output.view(torch.uint8).fill_(0xAA)  # equal to neither of the values it may have
            else:
                output.fill_(torch.nan if output.is_floating_point() else torch.iinfo(output.dtype).min)
        setting = self._setting()
        launched = getattr(self.library, f"emulate_{name}")(ctypes.byref(setting), ctypes.byref(call), *rest)
        if launched < 0:
            raise RuntimeError(f"{name} (seed {self.seed}): {self.library.emulator_error().decode()}")
        self.launches[name] = launched
        shape = (_I64 * len(Shape._fields))()
        self.library.emulator_shape(shape)
        self.shapes[name] = Shape(*shape)

    @staticmethod
    def _front(
        features: Tensor,
        weight: Tensor,
        target: Tensor | None,
        eps: float,
        cam: Tensor,
        cam32: Tensor,
        extent: Tensor,
    ) -> ctypes.Structure:
        images, channels, height, width = features.shape
        return _Front(
            features=_pointer(features),
            weight=_array(weight),
            target=_array(target),
            cam=_pointer(cam),
            cam32=_pointer(cam32),
            extent=_pointer(extent),
            images=images,
            classes=weight.shape[0],
            channels=channels,
            height=height,
            width=width,
            maps=cam.shape[1],
            eps=eps,
            features_dtype=_DTYPES.index(features.dtype),
            channels_last=_channels_last(features),
        )

    def cam_fwd(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor | None,
        bias: Tensor | None,
        normalize: bool,
        eps: float,
        cam: Tensor,
        cam32: Tensor,
        extent: Tensor,
    ) -> None:
        front = self._front(features, weight, target, eps, cam, cam32, extent)
        call = _CamFwd(front=front, bias=_array(bias), normalize=normalize)
        self._call("cam_fwd", call, [cam, cam32, extent])

    def cam_bwd(
        self,
        grad_cam: Tensor,
        features: Tensor,
        weight: Tensor,
        target: Tensor | None,
        cam: Tensor,
        extent: Tensor,
        normalize: bool,
        eps: float,
        need_features: bool,
        need_weight: bool,
        need_bias: bool,
        grad_features: Tensor,
        grad_weight: Tensor,
        grad_bias: Tensor,
    ) -> None:
        images, channels, height, width = features.shape
        call = _CamBwd(
            grad_cam=_array(grad_cam),
            features=_pointer(features),
            weight=_array(weight),
            target=_array(target),
            cam=_pointer(cam),
            extent=_pointer(extent),
            grad_features=_pointer(grad_features),
            grad_weight=_pointer(grad_weight),
            grad_bias=_pointer(grad_bias),
            images=images,
            classes=weight.shape[0],
            channels=channels,
            height=height,
            width=width,
            maps=grad_cam.shape[1],
            eps=eps,
            features_dtype=_DTYPES.index(features.dtype),
            channels_last=_channels_last(features),
            normalize=normalize,
        )
        self._call("cam_bwd", call, [grad_features, grad_weight, grad_bias])

    @staticmethod
    def _erasing(
        images: Tensor, cam: Tensor, threshold: float, sharpness: float, nearest: bool
    ) -> ctypes.Structure:
        return _Erasing(
            images=images.shape[0],
            depth=images.shape[1],
            image_height=images.shape[2],
            image_width=images.shape[3],
            map_height=cam.shape[2],
            map_width=cam.shape[3],
            threshold=threshold,
            sharpness=sharpness,
            dtype=_DTYPES.index(images.dtype),
            nearest=nearest,
            channels_last=_channels_last(images),
        )

    def cam_erase_fwd(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        images: Tensor,
        threshold: float,
        sharpness: float,
        fill: list[float],
        nearest: bool,
        eps: float,
        erased: Tensor,
        cam: Tensor,
        cam32: Tensor,
        extent: Tensor,
    ) -> None:
        call = _CamEraseFwd(
            front=self._front(features, weight, target, eps, cam, cam32, extent),
            erasing=self._erasing(images, cam, threshold, sharpness, nearest),
            images=_pointer(images),
            erased=_pointer(erased),
        )
        colours = (ctypes.c_double * len(fill))(*fill)
        self._call("cam_erase_fwd", call, [erased, cam, cam32, extent], colours, _I64(len(fill)))

    def cam_erase_bwd(
        self,
        grad_erased: Tensor,
        grad_cam: Tensor | None,
        images: Tensor | None,
        cam: Tensor,
        threshold: float,
        sharpness: float,
        fill: list[float],
        nearest: bool,
        need_images: bool,
        need_map: bool,
        grad_images: Tensor,
        grad_map: Tensor,
    ) -> None:
        call = _CamEraseBwd(
            erasing=self._erasing(grad_erased, cam, threshold, sharpness, nearest),
            grad_erased=_pointer(grad_erased),
            images=_pointer(images),
            cam=_pointer(cam),
            grad_cam=_array(grad_cam),
            grad_images=_pointer(grad_images),
            grad_map=_pointer(grad_map),
        )
        colours = (ctypes.c_double * len(fill))(*fill)
        self._call("cam_erase_bwd", call, [grad_images, grad_map], colours, _I64(len(fill)))

    @staticmethod
    def _transform(
        features: Tensor,
        features_t: Tensor,
        weight: Tensor,
        matrix: Tensor | None,
        whole: list[int],
        fractions: list[float],
        comparison: int,
    ) -> ctypes.Structure:
        images, channels, height, width = features.shape
        geometry = _Geometry(
            affine=matrix is not None,
            height=height,
            width=width,
            height_t=features_t.shape[2],
            width_t=features_t.shape[3],
        )
        if whole:
            geometry.transposed = bool(whole[0])
            geometry.rows = _Axis(whole[1], whole[2], fractions[0], whole[3], whole[4])
            geometry.columns = _Axis(whole[5], whole[6], fractions[1], whole[7], whole[8])
        return _CamTransform(
            features=_pointer(features),
            features_t=_pointer(features_t),
            weight=_array(weight),
            matrix=_array(matrix),
            geometry=geometry,
            images=images,
            classes=weight.shape[0],
            matrices=1 if matrix is None else matrix.shape[0],
            channels=channels,
            comparison=comparison,
            features_dtype=_DTYPES.index(features.dtype),
            channels_last=_channels_last(features),
            channels_last_t=_channels_last(features_t),
        )

    def cam_transform_mse_fwd(
        self,
        features: Tensor,
        features_t: Tensor,
        weight: Tensor,
        matrix: Tensor | None,
        whole: list[int],
        fractions: list[float],
        comparison: int,
        keep: bool,
        means: Tensor,
        kept: Tensor,
    ) -> None:
        call = _CamTransformMseFwd(
            maps=self._transform(features, features_t, weight, matrix, whole, fractions, comparison),
            means=_pointer(means),
            kept=_pointer(kept),
        )
        self._call("cam_transform_mse_fwd", call, [means, kept])

    def cam_transform_mse_bwd(
        self,
        grad_means: Tensor,
        features: Tensor,
        features_t: Tensor,
        weight: Tensor,
        matrix: Tensor | None,
        kept: Tensor,
        whole: list[int],
        fractions: list[float],
        comparison: int,
        need_features: bool,
        need_features_t: bool,
        need_weight: bool,
        grad_features: Tensor,
        grad_features_t: Tensor,
        grad_weight: Tensor,
    ) -> None:
        call = _CamTransformMseBwd(
            maps=self._transform(features, features_t, weight, matrix, whole, fractions, comparison),
            grad_means=_pointer(grad_means),
            kept=_pointer(kept),
            grad_features=_pointer(grad_features),
            grad_features_t=_pointer(grad_features_t),
            grad_weight=_pointer(grad_weight),
        )
        self._call("cam_transform_mse_bwd", call, [grad_features, grad_features_t, grad_weight])

    def cam_seeds_fwd(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        seed_features: Tensor,
        noise: Tensor | None,
        num_seeds: int,
        threshold: float,
        eps: float,
        vectors: Tensor,
        indices: Tensor,
        count: Tensor,
        cam: Tensor,
        cam32: Tensor,
        extent: Tensor,
    ) -> None:
        call = _CamSeedsFwd(
            front=self._front(features, weight, target, eps, cam, cam32, extent),
            seed_features=_pointer(seed_features),
            noise=_pointer(noise),
            vectors=_pointer(vectors),
            indices=_pointer(indices),
            count=_pointer(count),
            num_seeds=num_seeds,
            depth=seed_features.shape[1],
            threshold=threshold,
            seeds_dtype=_DTYPES.index(seed_features.dtype),
            seeds_channels_last=_channels_last(seed_features),
        )
        self._call("cam_seeds_fwd", call, [vectors, indices, count, cam, cam32, extent])

    def cam_seeds_bwd(
        self, grad_seed_features: Tensor, grad_vectors: Tensor, indices: Tensor, add: bool
    ) -> None:
        images, depth, height, width = grad_seed_features.shape
        call = _CamSeedsBwd(
            grad_vectors=_pointer(grad_vectors),
            indices=_pointer(indices),
            grad_seed_features=_pointer(grad_seed_features),
            images=images,
            num_seeds=grad_vectors.shape[1],
            depth=depth,
            height=height,
            width=width,
            dtype=_DTYPES.index(grad_seed_features.dtype),
            channels_last=_channels_last(grad_seed_features),
            add=add,
        )
        self._call("cam_seeds_bwd", call, [] if add else [grad_seed_features])

    @staticmethod
    def _groups(
        vectors: Tensor, order: Tensor, begin: Tensor, end: Tensor, squared: bool
    ) -> ctypes.Structure:
        images, num_seeds, depth = vectors.shape
        return _VectorGroups(
            vectors=_pointer(vectors),
            order=_pointer(order),
            begin=_pointer(begin),
            end=_pointer(end),
            images=images,
            num_seeds=num_seeds,
            depth=depth,
            dtype=_DTYPES.index(vectors.dtype),
            squared=squared,
        )

    def stochastic_consistency_fwd(
        self, vectors: Tensor, order: Tensor, begin: Tensor, end: Tensor, squared: bool, sums: Tensor
    ) -> None:
        groups = self._groups(vectors, order, begin, end, squared)
        call = _StochasticConsistencyFwd(groups=groups, sums=_pointer(sums))
        self._call("stochastic_consistency_fwd", call, [sums])

    def stochastic_consistency_bwd(
        self,
        vectors: Tensor,
        scale: Tensor,
        order: Tensor,
        begin: Tensor,
        end: Tensor,
        squared: bool,
        grad_vectors: Tensor,
    ) -> None:
        call = _StochasticConsistencyBwd(
            groups=self._groups(vectors, order, begin, end, squared),
            scale=_pointer(scale),
            grad_vectors=_pointer(grad_vectors),
        )
        self._call("stochastic_consistency_bwd", call, [grad_vectors])

    def otsu_mask_fwd(self, maps: Tensor, bins: int, mask: Tensor, threshold: Tensor) -> None:
        call = _OtsuMaskFwd(
            maps=_pointer(maps),
            mask=_pointer(mask),
            threshold=_pointer(threshold),
            count=maps.shape[0],
            pixels=maps.shape[1],
            bins=bins,
            dtype=_DTYPES.index(maps.dtype),
        )
        self._call("otsu_mask_fwd", call, [mask, threshold])

    def masked_max_pool_fwd(self, features: Tensor, mask: Tensor, pooled: Tensor, index: Tensor) -> None:
        images, channels, height, width = features.shape
        call = _MaskedMaxPoolFwd(
            features=_pointer(features),
            mask=_pointer(mask),
            pooled=_pointer(pooled),
            index=_pointer(index),
            images=images,
            channels=channels,
            height=height,
            width=width,
            dtype=_DTYPES.index(features.dtype),
            channels_last=_channels_last(features),
        )
        self._call("masked_max_pool_fwd", call, [pooled, index])

    def masked_max_pool_bwd(
        self, grad: Tensor, mask: Tensor, index: Tensor, channels_last: bool, grad_features: Tensor
    ) -> None:
        images, channels, height, width = grad_features.shape
        call = _MaskedMaxPoolBwd(
            grad=_pointer(grad),
            mask=_pointer(mask),
            index=_pointer(index),
            grad_features=_pointer(grad_features),
            images=images,
            channels=channels,
            height=height,
            width=width,
            dtype=_DTYPES.index(grad.dtype),
            channels_last=_channels_last(grad_features),
        )
        self._call("masked_max_pool_bwd", call, [grad_features])

    def _try(self, name: str, *arguments: Any) -> str:
        """Runs one of the emulator's own kernels; the error's text, empty if there was none."""
        setting = self._setting()
        launched = getattr(self.library, f"emulate_{name}")(ctypes.byref(setting), *arguments)
        return str(self.library.emulator_error().decode()) if launched < 0 else ""

    def reverse(self, mistake: str, fixed: bool = False) -> str:
        """What is wrong with a kernel that has that mistake; empty where nothing shows."""
        values = torch.arange(self.cluster * self.threads, dtype=torch.float32)
        result = torch.full_like(values, torch.nan)
        pointers = _Pointer(values.data_ptr()), _Pointer(result.data_ptr())
        error = self._try("reverse", *pointers, _I32(MISTAKES.index(mistake)), _Bool(fixed))
        return error or ("" if torch.equal(result, values.flip(0)) else "a wrong result")

    def _tested(self, name: str, values: Tensor, result: Tensor, *rest: Any) -> Tensor:
        pointers = _Pointer(values.data_ptr()), _Pointer(result.data_ptr())
        error = self._try(name, _I64(values.numel() // self.threads), *pointers, *rest)
        if error:
            raise RuntimeError(error)
        return result

    def block_sums(self, values: Tensor, mistake: str) -> Tensor:
        sums = torch.zeros(values.numel() // self.threads, dtype=torch.int32)
        return self._tested("block_sums", values, sums, _I32(MISTAKES.index(mistake)))

    def histogram(self, values: Tensor, bins: int, mistake: str) -> Tensor:
        counts = torch.zeros(bins, dtype=torch.int32)
        return self._tested("histogram", values, counts, _I32(bins), _I32(MISTAKES.index(mistake)))

    def tally(self, values: Tensor) -> Tensor:
        """Sum, most, least, union and intersection of bits, last value, sum of the values before it."""
        return self._tested("tally", values, torch.tensor([0, -1, 2**30, 0, -1, 0, 0], dtype=torch.int32))

    def launch(self, blocks: int, shared: int) -> str:
        """What is wrong with a launch of that size."""
        return self._try("launch", _I64(blocks), _I64(shared))
