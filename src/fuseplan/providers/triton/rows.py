"""Rows in registers: functions shared by the kernels of the norm and activation families and their epilogues."""

from fuseplan.providers.triton.language import cuda_capability_geq, tl, triton


@triton.jit
def narrowed(x, dtype: tl.constexpr, NVIDIA: tl.constexpr = False):
    """x as `dtype`, rounded to nearest."""
    # Two at a time; the compiler may convert one at a time, on a unit with an eighth of the throughput.
    BY_TWOS: tl.constexpr = NVIDIA and x.dtype == tl.float32 and cuda_capability_geq(8, 0)
    if BY_TWOS and dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif BY_TWOS and dtype == tl.float16:
        y = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        y = x.to(dtype)
    return y


@triton.jit
def widened(x, NVIDIA: tl.constexpr = False):
    """x in float32."""
    if NVIDIA and x.dtype == tl.bfloat16:
        # Two at a time, with one instruction each; for the upper one the compiler shifts down and up again.
        y = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def rounded(x, dtype: tl.constexpr, NVIDIA: tl.constexpr = False):
    """x rounded to `dtype`, in float32."""
    return widened(narrowed(x, dtype, NVIDIA), NVIDIA)


@triton.jit
def quotient(
    y, scale, DTYPE: tl.constexpr, OVERFLOWS: tl.constexpr, UNDERFLOWS: tl.constexpr, NVIDIA: tl.constexpr,
    SHORT: tl.constexpr = True,
):  # fmt: skip
    """y / scale to the nearest float32, for a y that DTYPE holds exactly, if the quotient is at least 2^-18. Below
    that, only its sign and that it is below are exact. Only if it OVERFLOWS may the quotient be 2^20 or more, and the
    result is then any such number; only if the scale UNDERFLOWS may the scale be below 2^-85. SHORT takes fewer
    instructions.
    """
    if not NVIDIA or tl.float32 == DTYPE:
        return tl.div_rn(y, scale)
    # By the reciprocal and one correction by the remainder: 3 instructions instead of a dozen. Unless the remainder is
    # subnormal, that is the nearest for every significand of bfloat16 or float16 over every one of float32: all were
    # tried.
    if UNDERFLOWS:
        unit = tl.where(tl.abs(scale) < 2.5849394142282115e-26, 18446744073709551616.0, 1.0)  # 2^-85, 2^64
        scale *= unit
        y *= unit
    if SHORT and tl.bfloat16 == DTYPE:
        # The bare instruction, off by a unit in the last place; it doesn't change any quotient of bfloat16 either.
        reciprocal = tl.inline_asm_elementwise("rcp.approx.f32 $0, $1;", "=f,f", [scale], tl.float32, True, 1)
    else:
        reciprocal = tl.div_rn(1.0, scale)
    reciprocal = tl.broadcast_to(reciprocal, y.shape)
    # Makes a finite number over infinity 0, not NaN.
    divisor = tl.broadcast_to(tl.where(tl.abs(scale) > 3.4028234663852886e38, 3.4028234663852886e38, scale), y.shape)
    first = y * reciprocal
    # Negated by products with -1, which the compiler turns into a modifier, and in this order, so that -0 stays -0.
    nearest = tl.fma(tl.fma(first, divisor, y * -1.0), reciprocal * -1.0, first)
    if OVERFLOWS:
        nearest = tl.where(tl.abs(first) > 1048576.0, first, nearest)
    return nearest


@triton.jit
def within(column, WIDTH: tl.constexpr):
    """column < WIDTH for a tile's columns; where tiles divide a row, a constant, so that the compiler drops masks."""
    if WIDTH // column.shape[0] * column.shape[0] == WIDTH:  # the interpreter's shapes have no remainder
        inside = tl.full(column.shape, True, tl.int1)
    else:
        inside = column < WIDTH
    return inside


@triton.jit
def silu(x, NVIDIA: tl.constexpr):
    """x / (1 + exp(-x)), off by two units in the last place of float32, which rarely affects narrower results."""
    if NVIDIA:
        # Without support for denormal numbers, which would cost more than the rest: exp(-x) beyond 2**126 gives 0.
        activated = tl.extra.cuda.libdevice.fast_dividef(x, 1.0 + tl.extra.cuda.libdevice.fast_expf(-x))
    else:
        activated = x / (1.0 + tl.exp(-x))
    return activated


@triton.jit
def quantized(
    y, scale, dtype: tl.constexpr, MOST: tl.constexpr, MULTIPLIES: tl.constexpr, ROUNDS: tl.constexpr,
    DTYPE: tl.constexpr, OVERFLOWS: tl.constexpr, UNDERFLOWS: tl.constexpr, NVIDIA: tl.constexpr,
    SHORT: tl.constexpr = True,
):  # fmt: skip
    """clamp(y / scale, -MOST, MOST) as `dtype`, for y in DTYPE or rounded to it in float32, with the quotient rounded
    to DTYPE or not; NaN stays NaN. Unless it OVERFLOWS, the quotient is at most MOST, except for its rounding; unless
    it UNDERFLOWS, the scale is at least 2^-85.
    """
    y = widened(y, NVIDIA)
    if MULTIPLIES:
        scaled = y * tl.div_rn(1.0, scale)
    else:
        scaled = quotient(y, scale, DTYPE, OVERFLOWS, UNDERFLOWS, NVIDIA, SHORT)
    if ROUNDS:
        scaled = rounded(scaled, DTYPE, NVIDIA)
    return codes_of(scaled, dtype, MOST, NVIDIA)


@triton.jit
def codes_of(scaled, dtype: tl.constexpr, MOST: tl.constexpr, NVIDIA: tl.constexpr):
    """clamp(scaled, -MOST, MOST) as `dtype`; NaN stays NaN."""
    if dtype == tl.float8e5:
        codes = e5m2_of(scaled).to(dtype, bitcast=True)
    else:
        if not NVIDIA:  # NVIDIA's conversion instructions clamp
            scaled = tl.where(scaled > MOST, MOST, scaled)
            scaled = tl.where(scaled < -MOST, -MOST, scaled)
        codes = scaled.to(dtype)
    return codes


@triton.jit
def e5m2_of(x):
    """Codes of float32 in float8_e5m2, in bytes: clamped to its largest, to nearest, ties to even; NaN is 0x7F.

    GPUs before Hopper have no conversion from float32, and a conversion through float16 rounds twice.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    small = (size.to(tl.float32, bitcast=True) + 128.0).to(tl.int32, bitcast=True) - 0x43000000
    normal = (size - 0x37F00001 + ((size >> 21) & 1)) >> 21
    code = tl.where(size < 0x38800000, small, normal)
    code = tl.where(size >= 0x47600000, 0x7B, code)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    sign = tl.where(size > 0x7F800000, 0, (bits >> 24) & 0x80)
    return (code | sign).to(tl.uint8)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def largest_bits(y, NVIDIA: tl.constexpr):
    """The float32 bits of amax(|y|) over the last dimension of y, in any dtype, as integers."""
    # Without their sign, numbers have the same order as integers, and NaN is the largest.
    if NVIDIA and y.dtype != tl.float32 and cuda_capability_geq(9, 0):
        # As 16-bit integers, which the compiler compares two at a time; `tl.max` would widen them.
        sizes = y.to(tl.int16, bitcast=True) & 0x7FFF
        largest = tl.reduce(sizes, len(y.shape) - 1, _larger).to(y.dtype, bitcast=True)
        bits = largest.to(tl.float32).to(tl.int32, bitcast=True)
    else:
        bits = tl.max(y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=-1)
    return bits


@triton.jit
def scaled_by_exponents(
    y, MOST: tl.constexpr, TOP: tl.constexpr, HALF: tl.constexpr, SCALING: tl.constexpr, NVIDIA: tl.constexpr
):
    """Groups [ROWS, groups, GROUP], each scaled by a power of two from its largest element, clamped or not, and the
    biased exponents, 255 for NaN. The largest code is MOST, with exponent TOP; HALF is half a unit in a code's last
    place, in units of float32's last place.
    """
    bits = largest_bits(y, NVIDIA)
    y = widened(y, NVIDIA)
    if SCALING == "rceil":
        wanted = tl.div_rn(bits.to(tl.float32, bitcast=True), MOST).to(tl.int32, bitcast=True)
        # 2^-127 and smaller numbers are subnormal, without an exponent of their own.
        exponent = tl.where(wanted <= 0x400000, 0, (wanted + 0x7FFFFF) >> 23)
        exponent = tl.where(exponent > 254, 254, exponent)
        factor = tl.where(exponent == 254, 0x400000, (254 - exponent) << 23)
        factor = tl.where(exponent == 0, 0x3F800000, factor)
        factor = tl.where(bits > 0x7F800000, 0x7FC00000, factor)
        scaled = y * factor.to(tl.float32, bitcast=True)[:, :, None]
    else:
        top = bits
        if SCALING == "even":
            top = bits + HALF
        exponent = (top >> 23) - TOP
        if SCALING == "ceil":
            exponent = tl.where((bits & 0x7FFFFF) > 0, exponent + 1, exponent)
        exponent = tl.where(exponent < 0, 0, exponent)
        exponent = tl.where(bits > 0x7F800000, 255, exponent)
        # The reciprocal: 0 for infinity, where a number is NaN; 2^-127 is subnormal.
        factor = (254 - tl.where(exponent == 0, 1, exponent)) << 23
        factor = tl.where(exponent == 254, 0x400000, tl.where(exponent == 255, 0, factor))
        scaled = y * factor.to(tl.float32, bitcast=True)[:, :, None]
    return scaled, tl.where(bits > 0x7F800000, 255, exponent)


@triton.jit
def _store_tiles(each, ptr, row, first, valid, rows, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """Stores bytes in tiles of 128 rows and 4 groups (`ScaleLayout.SWIZZLED`), for `rows` rows in all, and zeros for
    groups and rows of padding: row r writes the padding rows at rows + r, 2 * rows + r and so on.
    """
    GROUPS: tl.constexpr = WIDTH // GROUP
    TILES: tl.constexpr = (GROUPS + 3) // 4
    group = first // GROUP + tl.arange(0, each.shape[1])
    of_group = group // 4 * 512 + group % 4
    inside = within(group, TILES * 4)[None, :]
    filled = tl.where((group < GROUPS)[None, :], each, 0).to(tl.uint8)
    at = (row // 128).to(tl.int64) * (TILES * 512) + row % 32 * 16 + row % 128 // 32 * 4
    tl.store(ptr + at[:, None] + of_group[None, :], filled, mask=valid[:, None] & inside)
    padded = (rows + 127) // 128 * 128
    for step in tl.range(1, (padded + rows - 1) // rows):
        beyond = row + step * rows
        at = (beyond // 128).to(tl.int64) * (TILES * 512) + beyond % 32 * 16 + beyond % 128 // 32 * 4
        there = valid & (beyond < padded)
        tl.store(ptr + at[:, None] + of_group[None, :], tl.zeros_like(filled), mask=there[:, None] & inside)


@triton.jit
def store_bytes(
    each, ptr, row, first, valid, rows, first_row, WIDTH: tl.constexpr, GROUP: tl.constexpr, SWIZZLES: tl.constexpr,
):  # fmt: skip
    """Stores a byte, given as an integer, for each group of rows [ROWS, COLUMNS] from column `first` on; if it
    SWIZZLES, in tiles, `first_row` rows further on.
    """
    if SWIZZLES:
        _store_tiles(each, ptr, row + first_row, first, valid, rows, WIDTH, GROUP)
    else:
        GROUPS: tl.constexpr = WIDTH // GROUP
        group = first // GROUP + tl.arange(0, each.shape[1])
        at = row.to(tl.int64)[:, None] * GROUPS + group[None, :]
        tl.store(ptr + at, each.to(tl.uint8), mask=valid[:, None] & within(group, GROUPS)[None, :])


@triton.jit
def e4m3_of(x):
    """Numbers from 0 to 448 rounded to float8_e4m3fn, in float32, and its codes as integers; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    small = x + 16384.0  # its last bit is the smallest code's value
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0x7FF00000
    held = tl.where(x < 0.015625, small - 16384.0, normal.to(tl.float32, bitcast=True))
    code = tl.where(x < 0.015625, small.to(tl.int32, bitcast=True) - 0x46800000, (normal >> 20) - 960)
    return tl.where(x == x, held, x), tl.where(x == x, code, 0x7F)


@triton.jit
def e2m1_of(x):
    """Codes of float32 in e2m1, as integers: to nearest, ties to even; NaN gives a code that depends on its bits."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    magnitude = size.to(tl.float32, bitcast=True)
    small = (magnitude + 4194304.0).to(tl.int32, bitcast=True) - 0x4A800000
    normal = ((size - 0x3EE00001 + ((size >> 22) & 1)) >> 22) & 0xFF
    code = tl.where(magnitude >= 6.0, 7, tl.where(magnitude < 1.0, small, normal))
    return code | ((bits >> 28) & 8)


@triton.jit
def store_pairs(codes, y_ptr, row, first, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Stores codes of rows [ROWS, groups, GROUP], BLOCK of them a row from column `first` on, two a byte, with the
    first in the low half.
    """
    HALF: tl.constexpr = WIDTH // 2
    pairs = tl.reshape(codes, [codes.shape[0], BLOCK // 2, 2])
    both = tl.sum(pairs << (4 * tl.arange(0, 2)), axis=2)
    column = first // 2 + tl.arange(0, BLOCK // 2)
    at = row.to(tl.int64)[:, None] * HALF + column[None, :]
    tl.store(y_ptr + at, both.to(tl.uint8), mask=valid[:, None] & within(column, HALF)[None, :])


@triton.jit
def in_groups(
    y, row, first, valid, DTYPE: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Rows [ROWS, COLUMNS] from column `first` on, in DTYPE, as [ROWS, groups, GROUP] with zeros outside, and for
    storing them, both [ROWS, COLUMNS], offsets in elements and a mask of the elements that exist.
    """
    column = first + tl.arange(0, y.shape[1])
    out = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = valid[:, None] & within(column, WIDTH)[None, :]
    y = tl.reshape(narrowed(y, DTYPE, NVIDIA), [y.shape[0], y.shape[1] // GROUP, GROUP])
    return y, out, inside


@triton.jit
def dynamic_scale(
    y, min_scale, max_scale, upper_ptr, MOST: tl.constexpr, ROUNDS: tl.constexpr, IS_BOUNDED: tl.constexpr,
    OVERFLOWS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """clamp(amax(|y|) / MOST, min_scale, max_scale) over the last dimension of y, in float32, NaN where y has NaN; with
    the quotient rounded to y's dtype or not, and amax bounded by the value at a pointer or not. Unless it OVERFLOWS,
    there is no max_scale.
    """
    largest = largest_bits(y, NVIDIA).to(tl.float32, bitcast=True)
    if IS_BOUNDED:
        upper = tl.load(upper_ptr).to(tl.float32)
        largest = tl.where(largest > upper, upper, largest)
        largest = tl.where(upper == upper, largest, upper)
    if NVIDIA and y.dtype != tl.float32 and not IS_BOUNDED:
        # Rounded to nearest for all 16-bit numbers, with a correction by the remainder as in `quotient`.
        ONCE: tl.constexpr = 1.0 / MOST
        first = largest * ONCE
        scale = tl.fma(tl.fma(first, -MOST, largest), ONCE, first)
        scale = tl.where(largest > 3.4028234663852886e38, largest, scale)
    else:
        scale = tl.div_rn(largest, MOST)
    if ROUNDS:
        scale = rounded(scale, y.dtype)
    scale = tl.where(scale < min_scale, min_scale, scale)
    if OVERFLOWS:
        scale = tl.where(scale > max_scale, max_scale, scale)
    return scale


@triton.jit
def reciprocal_root(x, NVIDIA: tl.constexpr):
    """1 / sqrt(x), off by at most a unit in the last place of float32."""
    if NVIDIA:
        # The instruction is off by up to two units. One step of Newton's method corrects that, but makes NaN of 0 and
        # infinity.
        first = tl.inline_asm_elementwise("rsqrt.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        nearest = tl.fma(tl.fma(x * first, first * -1.0, 1.0), first * 0.5, first)
        root = tl.where(nearest == nearest, nearest, first)
    else:
        root = tl.div_rn(1.0, tl.sqrt_rn(x))
    return root


@triton.jit
def normalized(
    total, weight, eps, DTYPE: tl.constexpr, WIDTH: tl.constexpr, ROUNDS_NORMED: tl.constexpr, ADDS_ONE: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """total * rsqrt(mean(total^2) + eps) * weight of rows [ROWS, BLOCK], float32, 0 beyond WIDTH; in DTYPE if the norm
    is also rounded before the weight.
    """
    mean = tl.sum(total * total, axis=1) / WIDTH
    y = total * reciprocal_root(mean + eps, NVIDIA)[:, None]
    if ROUNDS_NORMED:
        y = rounded(y, DTYPE)
    # Widened after its change of layout, which so moves half as many bytes.
    weight = widened(weight[None, :], NVIDIA)
    if ADDS_ONE:
        weight = weight + 1.0
    y *= weight
    if ROUNDS_NORMED:  # the compiler then multiplies two numbers of 16 bits at a time
        y = y.to(DTYPE)
    return y
