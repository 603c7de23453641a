"""Rows of RULES by subject, beyond the arithmetic, views, products and norms that every model has: images and signals,
complex numbers and Fourier transforms, linear algebra, lookups and writes by index, random numbers.

A line names the ops that share an annotation (`passes.rules` makes a row of each that this torch has).

Random ops draw a rank's own numbers for what is split and the same on all ranks for what is whole, so those that draw each
element by itself are elementwise; those that drop channels keep the dims of space whole. `lstm`, `gru` and `rnn` hold all
layers and all steps in one op, whose hidden state meets itself at every step: they stay whole. Their cells are written out
(`passes.canonical_composites`) and split like any other product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from passes import contraction_patterns as contractions
from passes import index_patterns as indices
from passes import patterns
from passes import signal_patterns as signals


@dataclass(frozen=True)
class Rows:
    """Ops that share an annotation; `options` are further fields of their rows."""

    names: str
    annotation: str | patterns.Pattern
    linear: str | Callable[[patterns.Call], str] = ""
    options: Mapping[str, Any] = field(default_factory=dict)


ELEMENT: tuple[Rows, ...] = (
    Rows(
        "angle i0 isneginf isposinf sgn signbit polygamma mvlgamma round.decimals special_entr special_erfcx special_i0e "
        "special_i1 special_i1e special_log_ndtr special_ndtri special_airy_ai special_bessel_j0 special_bessel_j1 "
        "special_bessel_y0 special_bessel_y1 special_modified_bessel_i0 special_modified_bessel_i1 "
        "special_scaled_modified_bessel_k0 special_spherical_bessel_j0 "
        "__lshift__.Scalar __rshift__.Scalar bitwise_left_shift.Tensor bitwise_right_shift.Tensor "
        "logaddexp2 copysign.Tensor copysign.Scalar gcd lcm heaviside nextafter xlogy.Tensor xlogy.Scalar_Self "
        "xlogy.Scalar_Other special_xlog1py isclose ldexp.Tensor polar fill.Scalar fill.Tensor frexp.Tensor "
        "float_power.Tensor_Scalar",
        patterns.elementwise,
    ),
    Rows("deg2rad rad2deg conj_physical _conj resolve_conj resolve_neg complex", patterns.elementwise, "sum"),
    Rows("bucketize.Tensor isin.Tensor_Tensor", patterns.like_first),
)
COMPLEX: tuple[Rows, ...] = (
    Rows("view_as_real", "... -> ... [parts]", "sum"),
    Rows("view_as_complex", "... [parts] -> ...", "sum"),
    Rows("_fft_r2c _fft_c2c _fft_c2r", patterns.whole_dims(at=1, resized=True), "sum"),
    Rows("view.dtype", "... [x] -> ... [y]"),
)
SIGNALS: tuple[Rows, ...] = (
    Rows("adaptive_max_pool3d max_pool3d_with_indices", signals.planes(3)),
    Rows("adaptive_avg_pool3d upsample_nearest3d.vec upsample_trilinear3d.vec _upsample_nearest_exact3d.vec",
         signals.planes(3), "sum"),
    Rows("_upsample_nearest_exact2d.vec _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec", signals.planes(2), "sum"),
    Rows("_upsample_nearest_exact1d.vec", signals.planes(1), "sum"),
    Rows("max_unpool2d", signals.planes(2, "[x0] [x1]")),
    Rows("max_unpool3d", signals.planes(3, "[x0] [x1] [x2]")),
    Rows("fractional_max_pool2d", signals.planes(2, "[xy]")),
    Rows("fractional_max_pool3d", signals.planes(3, "[xyz]")),
    Rows("pixel_shuffle", signals.shuffled_pixels, "sum"),
    Rows("pixel_unshuffle", signals.unshuffled_pixels, "sum"),
    Rows("channel_shuffle", signals.shuffled_channels, "sum", {"counts": {"g": "groups"}}),
    Rows("im2col", signals.patches, "sum"),
    Rows("col2im", signals.from_patches, "sum"),
    Rows("grid_sampler_2d", signals.sampled(2)),
    Rows("grid_sampler_3d", signals.sampled(3)),
    Rows("affine_grid_generator", lambda call: "n [a] [b] -> n " + " ".join(
        f"[{name}]" for name in patterns.dim_names(len(call.outputs[0].shape) - 1)), "sum", {"sizes": 1}),
    Rows("instance_norm", signals.instance_norm),
    Rows("unfold", signals.windows, "sum"),
    Rows("rot90", patterns.whole_dims(at=2, name="dims", default=(0, 1), resized=True), "sum"),
)  # fmt: skip
ALGEBRA: tuple[Rows, ...] = (
    Rows("addbmm", contractions.addbmm),
    Rows("addmv", contractions.addmv),
    Rows("addr", contractions.addr),
    Rows("vdot", "k, k -> ", "each"),
    Rows("bilinear", contractions.bilinear, contractions.linear_without_bias),
    Rows("linalg_cross", contractions.cross, "each"),
    Rows("_cdist_forward _euclidean_dist", "... p [m], ... r [m] -> ... p r"),
    Rows("_weight_norm_interface", contractions.weight_norm),
    Rows(
        "linalg_cholesky_ex linalg_inv_ex _linalg_det _linalg_slogdet _linalg_solve_ex _linalg_svd _linalg_eigh linalg_qr "
        "linalg_lu_factor_ex linalg_matrix_exp linalg_pinv.atol_rtol_tensor linalg_solve_triangular",
        contractions.matrices,
    ),
    Rows("trace block_diag dist _pdist_forward renorm", patterns.all_whole),
)
REDUCTIONS: tuple[Rows, ...] = (
    Rows("nansum", patterns.summed),
    Rows("count_nonzero count_nonzero.dim_IntList median.dim nanmedian.dim std_mean.dim std_mean.correction",
         patterns.reduce()),
    Rows("mode", patterns.reduce(default=-1)),
    Rows("kthvalue", patterns.reduce(2, default=-1)),
    Rows("quantile.scalar nanquantile.scalar", patterns.reduce(2)),
    Rows("aminmax", patterns.reduce(1)),
    Rows("median nanmedian", patterns.reduce(-1)),
    Rows("cummax cummin", patterns.whole_dims()),
    Rows("native_layer_norm", patterns.layer_norm_with_statistics),
    Rows("multi_margin_loss multilabel_margin_loss_forward quantile nanquantile segment_reduce", patterns.all_whole),
)  # fmt: skip
INDICES: tuple[Rows, ...] = (
    Rows("index_add index_copy index_fill.int_Scalar index_fill.int_Tensor index_reduce", indices.along_dim),
    Rows("index_put", indices.put),
    Rows("take", indices.taken),
    Rows("_unsafe_index.Tensor", patterns.index),
    Rows("scatter.reduce scatter.value_reduce", patterns.by_index),
    Rows("searchsorted.Tensor", indices.sorted_places),
    Rows("diagonal diagonal_copy", indices.diagonal, "sum"),
    Rows("diag_embed", indices.embedded_diagonal, "sum"),
    Rows("embedding_bag embedding_bag.padding_idx", indices.bags, "", {"shared_results": True}),
    Rows("masked_scatter as_strided put", patterns.all_whole),
)
RANDOM: tuple[Rows, ...] = (
    Rows(
        "rand_like randn_like randint_like randint_like.low_dtype bernoulli bernoulli.p bernoulli.Tensor normal.Tensor_float "
        "normal.float_Tensor normal.Tensor_Tensor normal_functional exponential uniform cauchy geometric log_normal poisson "
        "alpha_dropout rrelu",
        patterns.elementwise,
    ),
    Rows("feature_dropout feature_alpha_dropout", patterns.channels),
    Rows("multinomial", "... [classes] -> ... [samples]"),
)

TABLE: tuple[Rows, ...] = (*ELEMENT, *COMPLEX, *SIGNALS, *ALGEBRA, *REDUCTIONS, *INDICES, *RANDOM)
