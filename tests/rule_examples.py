"""Example calls of the ops of passes/rule_table.py, for the loop of tests/test_rules.py."""

from __future__ import annotations

import torch
from rule_check import Example, above, below, buffer, call, f, flags, imaginary, permutations, unit

F32, F64 = torch.float32, torch.float64
X = f(6, 12)
SIGNAL, IMAGE, VOLUME = f(6, 12, 4), f(6, 12, 4, 4), f(6, 12, 2, 2, 2)
INTS, COMPLEX = below(9, 6, 12), imaginary(6, 12)


def _random(*args: object, **kwargs: object) -> list[Example]:
    return [call(*args, values=False, **kwargs)]


FURTHER: dict[str, list[Example]] = {
    # element by element
    "polygamma": [call(1, above(6, 12))], "mvlgamma": [call(above(6, 12), 1)], "round.decimals": [call(X, decimals=1)],
    "special_entr": [call(unit(6, 12))], "special_ndtri": [call(unit(6, 12))],
    "special_modified_bessel_i0": [call(buffer(6, 12))], "special_modified_bessel_i1": [call(buffer(6, 12))],
    **{f"special_{name}": [call(buffer(6, 12))] for name in ("bessel_y0", "bessel_y1", "scaled_modified_bessel_k0")},
    "__lshift__.Scalar": [call(INTS, 2)], "__rshift__.Scalar": [call(INTS, 1)],
    **{name: [call(INTS, below(4, 12))] for name in ("bitwise_left_shift.Tensor", "bitwise_right_shift.Tensor", "gcd", "lcm")},
    "copysign.Scalar": [call(X, -2.0)], "heaviside": [call(buffer(6, 12), buffer(12))],
    "nextafter": [call(buffer(6, 12), buffer(12))],
    "xlogy.Tensor": [call(X, unit(12))], "xlogy.Scalar_Self": [call(2.0, unit(6, 12))], "xlogy.Scalar_Other": [call(X, 0.5)],
    "special_xlog1py": [call(X, unit(12))],
    "isclose": [call(X, f(12), 0.5, 0.5)], "polar": [call(unit(6, 12), X)], "fill.Scalar": [call(X, 2.0)],
    "fill.Tensor": [call(X, f())], "float_power.Tensor_Scalar": [call(unit(6, 12), 1.5)], "ldexp.Tensor": [call(X, below(3, 12))],
    "complex": [call(X, X), call(f(6, 1), f(12))],
    **{name: [call(COMPLEX)] for name in ("conj_physical", "_conj", "resolve_conj", "resolve_neg")},
    "angle": [call(COMPLEX)], "sgn": [call(COMPLEX), call(X)],
    "bucketize.Tensor": [call(X, Example.steps(5))], "isin.Tensor_Tensor": [call(INTS, below(9, 3, 2))],
    # complex numbers
    "view_as_real": [call(COMPLEX)], "view_as_complex": [call(f(6, 12, 2))],
    "_fft_r2c": [call(f(6, 5, 12), [1], 0, True), call(f(4, 12, 6), [2, 0], 1, False)],
    "_fft_c2c": [call(imaginary(6, 5, 12), [1], 0, True)], "_fft_c2r": [call(imaginary(6, 3, 12), [1], 0, 4)],
    "view.dtype": [call(buffer(6, 12), torch.int32), call(buffer(6, 12), torch.int64)],
    # images
    "max_pool3d_with_indices": [call(VOLUME, [2, 2, 2])], "adaptive_max_pool3d": [call(VOLUME, [1, 1, 1])],
    "adaptive_avg_pool3d": [call(VOLUME, [1, 1, 2])],
    "upsample_nearest3d.vec": [call(VOLUME, None, [2.0, 2.0, 2.0])], "_upsample_nearest_exact3d.vec": [call(VOLUME, [3, 3, 3], None)],
    "upsample_trilinear3d.vec": [call(VOLUME, [3, 3, 3], False, None)],
    "_upsample_nearest_exact2d.vec": [call(IMAGE, [6, 6], None)], "_upsample_nearest_exact1d.vec": [call(SIGNAL, [6], None)],
    **{name: [call(IMAGE, [2, 2], False, None)] for name in ("_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec")},
    "max_unpool2d": [call(f(6, 12, 2, 2), permutations(6, 12, 2, 2), [4, 4])],
    "max_unpool3d": [call(f(6, 12, 2, 2, 1), permutations(6, 12, 2, 2, 1), [4, 4, 2], [2, 2, 2], [0, 0, 0])],
    "fractional_max_pool2d": [call(IMAGE, [2, 2], [2, 2], Example.fractions(6, 12, 2))],
    "fractional_max_pool3d": [call(f(6, 12, 4, 4, 4), [2, 2, 2], [2, 2, 2], Example.fractions(6, 12, 3))],
    "pixel_shuffle": [call(f(6, 24, 3, 3), 2), call(f(2, 6, 16, 2, 2), 2)],
    "pixel_unshuffle": [call(f(6, 12, 4, 4), 2), call(f(12, 4, 4), 2)],
    "channel_shuffle": [call(f(2, 24, 3, 3), 2), call(f(2, 36, 2, 2), 6)],
    "im2col": [call(f(6, 12, 4, 4), [2, 2], [1, 1], [0, 0], [1, 1]), call(f(12, 4, 4), [2, 1], [1, 1], [0, 0], [2, 2])],
    "col2im": [call(f(6, 48, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])],
    "grid_sampler_2d": [call(f(6, 12, 4, 4), f(6, 6, 3, 2), 0, 0, False)],
    "grid_sampler_3d": [call(f(2, 6, 3, 3, 3), f(2, 2, 6, 3, 3), 0, 0, False)],
    "affine_grid_generator": [call(f(6, 2, 3), [6, 1, 4, 4], False)],
    "instance_norm": [call(IMAGE, f(12), f(12), None, None, True, 0.1, 1e-5, False),
        call(SIGNAL, None, None, None, None, True, 0.1, 1e-5, False),
        call(SIGNAL, f(12), None, buffer(12), buffer(12), True, 0.1, 1e-5, False)],
    "unfold": [call(f(6, 12, 6), 1, 3, 2)], "rot90": [call(f(6, 3, 12, 2), 1, [1, 3]), call(X, 2, [0, 1])],
    **{f"conv{k}d.padding": [call(f(2, 6, *[4] * k), f(12, 6, *[3] * k), None, [1] * k, "same", [1] * k, 1),
        call(f(2, 12, *[4] * k), f(12, 2, *[3] * k), f(12), [1] * k, "valid", [1] * k, 6)] for k in (1, 2, 3)},
    # linear algebra
    "addbmm": [call(f(6, 12), f(6, 6, 2), f(6, 2, 12)), call(f(12), f(6, 6, 2), f(6, 2, 12), beta=2)],
    "addmv": [call(f(6), f(6, 12), f(12)), call(f(), f(6, 12), f(12))], "addr": [call(X, f(6), f(12)), call(f(12), f(6), f(12))],
    "vdot": [call(f(12), f(12))], "bilinear": [call(f(3, 6), f(3, 12), f(6, 6, 12), None), call(f(3, 6), f(3, 12), f(6, 6, 12), f(6))],
    "linalg_cross": [call(f(6, 3, 12), f(6, 3, 12), dim=1), call(f(6, 3), f(6, 3))],
    "_cdist_forward": [call(f(2, 6, 3), f(2, 12, 3), p, None) for p in (2.0, 1.0)] + [call(f(6, 3), f(12, 3), 2.0, None)],
    "_euclidean_dist": [call(f(2, 6, 3), f(2, 12, 3))],
    "_weight_norm_interface": [call(f(6, 2, 3), f(6, 1, 1)), call(f(3, 12), f(1, 12), 1)],
    "linalg_cholesky_ex": [call(Example.positive(6, 3, 3))], "linalg_inv_ex": [call(f(6, 3, 3))],
    "_linalg_det": [call(f(6, 3, 3)), call(f(6, 12, 2, 2))],
    "_linalg_slogdet": [call(f(6, 3, 3))], "_linalg_solve_ex": [call(f(6, 3, 3), f(6, 3, 2))], "_linalg_svd": [call(f(6, 4, 3))],
    "_linalg_eigh": [call(Example.positive(6, 3, 3))], "linalg_qr": [call(f(6, 4, 3))], "linalg_lu_factor_ex": [call(f(6, 3, 3))],
    "linalg_matrix_exp": [call(f(6, 3, 3))], "linalg_pinv.atol_rtol_tensor": [call(f(6, 4, 3))],
    "linalg_solve_triangular": [call(Example.positive(6, 3, 3), f(6, 3, 2), upper=True)],
    "trace": [call(f(6, 6))], "block_diag": [call([X, X])], "dist": [call(X, X)], "_pdist_forward": [call(X)],
    "renorm": [call(X, 2, 1, 1.0)],
    # reductions
    "nansum": [call(f(6, 2, 12), [1]), call(X)], "count_nonzero": [call(INTS), call(INTS, 1)],
    "count_nonzero.dim_IntList": [call(below(2, 6, 3, 12), [1])],
    **{name: [call(f(6, 3, 12), 1), call(X, 0, True)] for name in ("median.dim", "nanmedian.dim", "mode")},
    "std_mean.dim": [call(f(6, 3, 12), [1])], "std_mean.correction": [call(f(6, 3, 12), [1], correction=0, keepdim=True)],
    "kthvalue": [call(f(6, 3, 12), 2, 1), call(X, 2)], "quantile.scalar": [call(f(6, 3, 12), 0.3, 1), call(X, 0.3)],
    "nanquantile.scalar": [call(f(6, 3, 12), 0.3, 1, True)], "aminmax": [call(f(6, 3, 12), dim=1), call(X)],
    "median": [call(X)], "nanmedian": [call(X)], "cummax": [call(f(6, 3, 12), 1)], "cummin": [call(f(6, 3, 12), 1)],
    "native_layer_norm": [call(f(6, 2, 12), [12], f(12), f(12), 1e-5), call(f(6, 2, 12), [2, 12], None, None, 1e-5)],
    "multi_margin_loss": [call(X, below(12, 6))], "multilabel_margin_loss_forward": [call(X, below(12, 6, 12), 1)],
    "quantile": [call(X, Example.steps(2), 1)], "nanquantile": [call(X, Example.steps(2), 1)],
    "segment_reduce": [call(X, "sum", lengths=Example.counts(2, 4))],
    # indices
    "index_add": [call(f(6, 5, 12), 1, below(5, 3), f(6, 3, 12)), call(X, 0, below(6, 4), f(4, 12))],
    "index_copy": [call(f(6, 5, 12), 1, Example.counts(0, 3), f(6, 2, 12))],
    "index_fill.int_Scalar": [call(f(6, 5, 12), 1, below(5, 2), 0.5)],
    "index_fill.int_Tensor": [call(f(6, 5, 12), 1, below(5, 2), f())],
    "index_reduce": [call(f(6, 5, 12), 1, below(5, 3), f(6, 3, 12), "mean")],
    "index_put": [call(X, [Example.counts(0, 3)], f(2, 12)), call(f(6, 5, 12), [None, Example.counts(0, 3)], f(6, 2, 12)),
        call(f(6, 5, 12), [None, below(5, 3)], f(3, 1), True), call(f(6, 5, 4, 12), [None, below(5, 3), below(4, 3)], f(6, 3, 12), True),
        call(f(6, 5, 12, 4), [None, below(5, 3), None, below(4, 3)], f(3, 6, 12), True), call(X, [below(6, 3), below(12, 3)], f()),
        call(X, [flags(6, 12)], f()), call(X, [flags(6)], f(1))],
    "take": [call(X, below(72, 6, 12))], "_unsafe_index.Tensor": [call(f(6, 5, 12), [None, below(5, 6)])],
    "scatter.reduce": [call(buffer(6, 3, 12), 1, below(3, 6, 2, 12), buffer(6, 2, 12), reduce="add")],
    "scatter.value_reduce": [call(buffer(6, 3, 12), 1, below(3, 6, 2, 12), 2.0, reduce="multiply")],
    "searchsorted.Tensor": [call(Example.steps(5), X), call(Example.steps(6, 4), f(6, 12)),
        call(Example.steps(6, 4), f(6, 12), sorter=permutations(6, 4))],
    "diagonal": [call(f(6, 3, 3, 12), 0, 1, 2), call(X, 1)], "diagonal_copy": [call(f(6, 3, 3, 12), 0, 1, 2)],
    "diag_embed": [call(f(6, 12, 3)), call(f(6, 12, 3), 1, 0, 2)],
    "embedding_bag": [call(f(5, 12), below(5, 9), Example.counts(0, 4)), call(f(5, 12), below(5, 9), Example.counts(0, 4), False, 1),
        call(f(5, 12), below(5, 9), Example.counts(0, 4), False, 2),
            call(f(5, 12), below(5, 9), Example.counts(0, 4), False, 0, False, f(9))],
    "embedding_bag.padding_idx": [call(f(5, 12), below(5, 9), Example.counts(0, 4), False, 1, False, None, False, 1)],
    "masked_scatter": [call(X, flags(6, 12), X)], "as_strided": [call(X, [6], [12])], "put": [call(X, below(72, 4), f(4))],
    # random numbers
    **{name: _random(X) for name in ("rand_like", "randn_like", "exponential", "uniform", "cauchy", "log_normal")},
    "randint_like": _random(buffer(6, 12), 5), "randint_like.low_dtype": _random(buffer(6, 12), 1, 5),
    "bernoulli": _random(unit(6, 12)), "bernoulli.p": _random(buffer(6, 12), 0.5),
    "bernoulli.Tensor": _random(X, unit(12)), "normal.Tensor_float": _random(X, 1.0), "normal.float_Tensor": _random(0.0, unit(6, 12)),
    "normal.Tensor_Tensor": _random(X, unit(12)), "normal_functional": _random(buffer(6, 12)),
    "geometric": _random(X, 0.5), "poisson": _random(unit(6, 12)),
    "alpha_dropout": [call(X, 0.5, False)], "rrelu": [call(X, 0.1, 0.3, False)],
    "feature_dropout": [call(IMAGE, 0.5, False)], "feature_alpha_dropout": [call(IMAGE, 0.5, False)],
    "multinomial": _random(unit(6, 5), 3),
}  # fmt: skip
