"""Operators that do the same to the positions of their axes, by family."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names(
    "to _to_copy contiguous dropout feature_dropout alpha_dropout feature_alpha_dropout hardswish type_as detach alias "
    "clone lift_fresh zeros_like ones_like full_like empty_like rand_like randn_like rrelu softplus celu selu elu "
    "threshold log_sigmoid hardsigmoid masked_fill where clamp addcmul addcdiv lerp expand_as bernoulli resolve_conj "
    "resolve_neg _conj fill zero square absolute multiply divide subtract true_divide greater less greater_equal "
    "less_equal not_equal relu6 hardtanh"
)
CREATIONS = _names("arange zeros ones full empty eye linspace logspace rand randn randint scalar_tensor")
RESHAPES = _names("view reshape _unsafe_view _reshape_alias unflatten flatten squeeze unsqueeze ravel")
PERMUTATIONS = _names("permute transpose t movedim moveaxis swapaxes swapdims")
POOLS = _names(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d "
    "max_pool2d max_pool3d max_pool2d_with_indices upsample_bicubic2d upsample_bilinear2d upsample_linear1d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
REDUCTIONS = _names("mean sum amax amin var std var_mean std_mean")
ALONG_AN_AXIS = _names("softmax log_softmax _softmax _log_softmax cumsum cumprod flip")
SPLITS = _names("split split_with_sizes chunk unsafe_chunk unsafe_split unsafe_split_with_sizes tensor_split")
PRODUCTS = _names("matmul bmm mm addmm baddbmm")
