"""Which operators an uploaded graph may call. Anything else is refused by name.

All are pure tensor functions of aten (or their in-place forms): none reads a file, makes a handle, calls back into
Python or returns a size that depends on values.
"""

import functools

import torch

# Work that macs.py counts, or names as uncounted.
CONTRACTIONS = """
_int_mm addbmm addmm addmv addr baddbmm bilinear bmm cdist chain_matmul conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d convolution cross dot einsum gru inner kron linalg_multi_dot linear lstm matmul mm mv
outer rnn_relu rnn_tanh scaled_dot_product_attention tensordot vdot linalg_vecdot
_scaled_dot_product_flash_attention_for_cpu
"""

LAYERS = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm channel_shuffle constant_pad_nd cosine_similarity dropout
_adaptive_avg_pool2d _adaptive_avg_pool3d embedding embedding_bag feature_alpha_dropout feature_dropout im2col col2im
grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator group_norm instance_norm layer_norm
max_pool1d max_pool2d max_pool2d_with_indices max_pool3d max_unpool2d native_batch_norm native_dropout native_group_norm
native_layer_norm _native_batch_norm_legit _native_batch_norm_legit_functional _native_batch_norm_legit_no_training
pad pixel_shuffle pixel_unshuffle prelu _prelu_kernel reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d rms_norm rrelu unfold upsample_bicubic2d upsample_bilinear2d
upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa _weight_norm
_weight_norm_interface
"""

SHAPES = """
_reshape_alias _shape_as_tensor _to_copy _unsafe_view alias arange atleast_1d atleast_2d atleast_3d block_diag
broadcast_tensors broadcast_to cat chunk clone combinations concat  contiguous copy copy_ detach detach_
diag diag_embed diagonal diagonal_scatter dsplit dstack empty empty_like expand expand_as eye fill fill_ flatten flip
fliplr flipud full full_like gather hsplit hstack index index_add index_add_ index_copy index_copy_ index_fill
index_fill_ index_put index_put_ index_select lift_fresh lift_fresh_copy linspace logspace masked_fill masked_fill_
masked_scatter meshgrid moveaxis movedim narrow new_empty new_full new_ones new_zeros numel ones ones_like permute
permute_copy ravel repeat repeat_interleave reshape resolve_conj resolve_neg roll rot90 rsub scalar_tensor scatter
scatter_ scatter_add scatter_add_ scatter_reduce select select_copy select_scatter slice slice_copy slice_scatter split
split_copy split_with_sizes split_with_sizes_copy squeeze squeeze_ squeeze_copy stack swapaxes swapdims sym_numel
sym_size sym_stride t t_copy take take_along_dim tensor_split tile to transpose transpose_ transpose_copy tril tril_
tril_indices triu triu_ triu_indices type_as unbind unflatten unsafe_chunk unsafe_split unsafe_split_with_sizes
unsqueeze unsqueeze_ unsqueeze_copy view view_as view_copy vsplit vstack zero_ zeros zeros_like
expand_copy alias_copy
"""

POINTWISE = """
__and__ __lshift__ __or__ __rshift__ __xor__ _softmax _log_softmax _log_softmax_backward_data _conj abs abs_ absolute
acos acosh add add_ addcdiv addcdiv_ addcmul addcmul_ all amax amin aminmax any arccos arcsin arctan arctan2 argmax
argmin argsort asin asinh atan atan2 atanh avg_pool1d bernoulli bincount bitwise_and bitwise_and_ bitwise_left_shift
bitwise_left_shift_ bitwise_not
bitwise_or bitwise_right_shift bitwise_xor bucketize ceil ceil_ celu celu_ clamp clamp_ clamp_max clamp_max_ clamp_min
clamp_min_ clip clip_ copysign corrcoef cos cos_ cosh count_nonzero cov cummax cummin cumprod cumsum cumsum_
deg2rad diff digamma dist div div_ divide elu elu_ eq eq_ equal erf erf_ erfc erfinv exp exp2 exp_ expm1 fix
float_power floor floor_ floor_divide fmax fmin fmod frac ge ge_ gelu gelu_ glu greater greater_equal gt gt_ hardshrink
hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ heaviside hypot i0 isclose isfinite isin isinf isnan
isneginf isposinf isreal kthvalue le le_ leaky_relu leaky_relu_ lerp less less_equal lgamma linalg_norm
linalg_vector_norm log log10 log1p log2 log_ log_sigmoid log_softmax logaddexp logaddexp2 logcumsumexp logical_and
logical_and_ logical_not logical_not_ logical_or logical_or_ logical_xor logit logsumexp lt lt_ max maximum mean median
min minimum mish mish_ mode msort mul mul_ multiply nan_to_num nan_to_num_ nanmean nanmedian nansum ne ne_ neg neg_
negative nextafter norm  not_equal one_hot polygamma positive pow pow_ prod quantile rad2deg reciprocal reciprocal_
relu relu6 relu6_ relu_ remainder remainder_ renorm round round_ rsqrt rsqrt_ searchsorted selu selu_ sgn sigmoid
sigmoid_ sign sign_ signbit silu silu_ sin sin_ sinc sinh softmax softplus softshrink sort special_expit special_erf
special_expm1 special_log1p special_logit special_xlogy sqrt sqrt_ square square_ std std_mean sub sub_ subtract sum
tan tanh tanh_ threshold threshold_ topk trace true_divide trunc trunc_ var var_mean where xlogy
linalg_matrix_norm trapezoid binary_cross_entropy binary_cross_entropy_with_logits cross_entropy_loss huber_loss
kl_div l1_loss mse_loss nll_loss nll_loss2d nll_loss_nd smooth_l1_loss cosine_embedding_loss margin_ranking_loss
"""

RANDOM = "rand rand_like randn randn_like randint randint_like randperm normal uniform uniform_ normal_ bernoulli_"

ASSERTIONS = "_assert_tensor_metadata _assert_scalar sym_constrain_range sym_constrain_range_for_size"
"""Checks of the exporter, dropped at import."""

_GROUPS = (CONTRACTIONS, LAYERS, SHAPES, POINTWISE, RANDOM, ASSERTIONS)
ALLOWED = frozenset(name for group in _GROUPS for name in group.split())

_SIZE_OPERATORS = ("eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv", "mod", "truediv")
SIZE_FUNCTIONS = frozenset(
    [
        *(f"_operator.{name}" for name in (*_SIZE_OPERATORS, "and_", "or_")),
        *(f"torch.sym_{name}" for name in ("not", "int", "float", "ite", "max", "min")),
        "math.trunc",
    ]
)
"""Arithmetic on sizes, by the name a graph calls it."""

GRAD_MODE = "torch.ops.higher_order.wrap_with_set_grad_enabled"
AUTOCAST = "torch.ops.higher_order.wrap_with_autocast"
"""Operators that hold a graph of their own; autocast only where it is switched off."""

_PREFIX = "torch.ops.aten."
_ARGUMENT_TYPES = ("Tensor", "int", "float", "bool", "number", "Device", "str", "Optional", "List")
_WITHOUT_TENSOR = [*ASSERTIONS.split(), "sym_size", "sym_numel", "sym_stride"]


@functools.cache
def find_operator(target: str) -> torch._ops.OpOverload | None:
    """Return the aten operator a graph's target names, or None where it is not allowed."""
    if not target.startswith(_PREFIX):
        return None
    name, _, overload = target.removeprefix(_PREFIX).partition(".")
    packet = getattr(torch.ops.aten, name) if name in ALLOWED else None
    if packet is None or overload not in packet.overloads():
        return None
    operator: torch._ops.OpOverload = getattr(packet, overload)
    schema = operator._schema
    if name not in _WITHOUT_TENSOR and not any("Tensor" in str(value.type) for value in schema.returns):
        return None
    for argument in schema.arguments:
        kind = str(argument.type)
        # A generator can only be left out: none can come from a file.
        known = kind.startswith(_ARGUMENT_TYPES) and ("Generator" not in kind or argument.has_default_value())
        if argument.is_out or not known:
            return None
    return operator
