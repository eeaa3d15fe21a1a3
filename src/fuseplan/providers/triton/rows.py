"""What all kernels of the norm and activation families share, and their epilogues: rows in registers."""

from fuseplan.providers.triton.language import cuda_capability_geq, tl, triton


@triton.jit
def narrowed(x, dtype: tl.constexpr, NVIDIA: tl.constexpr = False):
    """x as `dtype`, to the nearest."""
    # By twos; one at a time, as the compiler may take them, is the work of a unit with an eighth of the throughput.
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
        # By twos, an instruction each; the compiler takes the upper one of two by a shift down and one up.
        y = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def rounded(x, dtype: tl.constexpr, NVIDIA: tl.constexpr = False):
    """x as `dtype` holds it, in float32."""
    return widened(narrowed(x, dtype, NVIDIA), NVIDIA)


@triton.jit
def quotient(
    y, scale, DTYPE: tl.constexpr, OVERFLOWS: tl.constexpr, UNDERFLOWS: tl.constexpr, NVIDIA: tl.constexpr,
    SHORT: tl.constexpr = True,
):  # fmt: skip
    """y / scale to the nearest float32, of y that DTYPE holds, where that is at least 2^-18; below, nothing but its
    sign and its being below is sure. Only where it OVERFLOWS it may be 2^20 or more, and is then any such number; only
    where the scale UNDERFLOWS it may be below 2^-85. The same by fewer instructions where it is SHORT.
    """
    if not NVIDIA or tl.float32 == DTYPE:
        return tl.div_rn(y, scale)
    # By the reciprocal, and the remainder once: 3 instructions in place of a dozen. While the remainder isn't
    # subnormal, that is the nearest for every significand of bfloat16 or float16 over every one of float32: all were
    # tried.
    if UNDERFLOWS:
        unit = tl.where(tl.abs(scale) < 2.5849394142282115e-26, 18446744073709551616.0, 1.0)  # 2^-85, 2^64
        scale *= unit
        y *= unit
    if SHORT and tl.bfloat16 == DTYPE:
        # The instruction alone, off by a unit in the last place: by it no quotient of bfloat16 is another one, either.
        reciprocal = tl.inline_asm_elementwise("rcp.approx.f32 $0, $1;", "=f,f", [scale], tl.float32, True, 1)
    else:
        reciprocal = tl.div_rn(1.0, scale)
    reciprocal = tl.broadcast_to(reciprocal, y.shape)
    # So that a finite number over infinity is 0, not NaN.
    divisor = tl.broadcast_to(tl.where(tl.abs(scale) > 3.4028234663852886e38, 3.4028234663852886e38, scale), y.shape)
    first = y * reciprocal
    # Negated by products with -1, which the compiler makes a modifier, and in this order, so that -0 stays -0.
    nearest = tl.fma(tl.fma(first, divisor, y * -1.0), reciprocal * -1.0, first)
    if OVERFLOWS:
        nearest = tl.where(tl.abs(first) > 1048576.0, first, nearest)
    return nearest


@triton.jit
def within(column, WIDTH: tl.constexpr):
    """column < WIDTH, of a tile's columns; a constant, by which the compiler drops masks, where tiles divide a row."""
    if WIDTH // column.shape[0] * column.shape[0] == WIDTH:  # the interpreter's shapes have no remainder
        inside = tl.full(column.shape, True, tl.int1)
    else:
        inside = column < WIDTH
    return inside


@triton.jit
def silu(x, NVIDIA: tl.constexpr):
    """x / (1 + exp(-x)), off by two units in the last place of float32, which narrower results hardly ever show."""
    if NVIDIA:
        # Without care for denormal numbers, which costs more than the rest: exp(-x) beyond 2**126 gives 0.
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
    """clamp(y / scale, -MOST, MOST) as `dtype`, of y, in DTYPE or in float32 as DTYPE holds it, the quotient rounded to
    DTYPE or not; NaN stays NaN. Unless it OVERFLOWS, the quotient is at most MOST, but for its rounding; unless it
    UNDERFLOWS, the scale is 2^-85 at least.
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
        if not NVIDIA:  # whose conversion instructions clamp
            scaled = tl.where(scaled > MOST, MOST, scaled)
            scaled = tl.where(scaled < -MOST, -MOST, scaled)
        codes = scaled.to(dtype)
    return codes


@triton.jit
def e5m2_of(x):
    """Codes of float32 in float8_e5m2, in bytes: clamped to its largest, to the nearest, ties to even; NaN is 0x7F.

    GPUs before Hopper have no conversion of float32, and one by way of float16 rounds twice.
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
    """The bits of amax(|y|) over the last dimension of y, of any dtype, in float32, as integers."""
    # Without their sign, numbers are in order as integers too, and NaN is the largest.
    if NVIDIA and y.dtype != tl.float32 and cuda_capability_geq(9, 0):
        # As integers of 16 bits, of which the compiler compares two at a time; `tl.max` would make them wider.
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
    """Groups [ROWS, groups, GROUP] as a power of two by the largest of each scales them, clamped or not, and its biased
    exponents, 255 of NaN. The largest code is MOST, of exponent TOP, and HALF of its last digit's unit is that in
    float32's.
    """
    bits = largest_bits(y, NVIDIA)
    y = widened(y, NVIDIA)
    if SCALING == "rceil":
        wanted = tl.div_rn(bits.to(tl.float32, bitcast=True), MOST).to(tl.int32, bitcast=True)
        # 2^-127 has no exponent of its own, nor has what is below it.
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
        # The reciprocal: of infinity, where a number is NaN, 0; 2^-127 is subnormal.
        factor = (254 - tl.where(exponent == 0, 1, exponent)) << 23
        factor = tl.where(exponent == 254, 0x400000, tl.where(exponent == 255, 0, factor))
        scaled = y * factor.to(tl.float32, bitcast=True)[:, :, None]
    return scaled, tl.where(bits > 0x7F800000, 255, exponent)


@triton.jit
def _store_tiles(each, ptr, row, first, valid, rows, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """Stores bytes in tiles of 128 rows and 4 groups (`ScaleLayout.SWIZZLED`), of so many rows in all, and zeros for
    groups and rows that aren't there: each row writes those that are as far behind all rows as it, and again as far.
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
    for turn in tl.range(1, (padded + rows - 1) // rows):
        beyond = row + turn * rows
        at = (beyond // 128).to(tl.int64) * (TILES * 512) + beyond % 32 * 16 + beyond % 128 // 32 * 4
        there = valid & (beyond < padded)
        tl.store(ptr + at[:, None] + of_group[None, :], tl.zeros_like(filled), mask=there[:, None] & inside)


@triton.jit
def store_bytes(
    each, ptr, row, first, valid, rows, first_row, WIDTH: tl.constexpr, GROUP: tl.constexpr, SWIZZLES: tl.constexpr,
):  # fmt: skip
    """Stores a byte for each group of rows [ROWS, COLUMNS] from column `first` on, given as integers; in tiles, where
    it SWIZZLES, of which the row is `first_row` rows further on.
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
    """Numbers from 0 to 448 as float8_e4m3fn holds them, in float32, and its codes as integers; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    small = x + 16384.0  # whose last digit is the smallest code's value
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0x7FF00000
    held = tl.where(x < 0.015625, small - 16384.0, normal.to(tl.float32, bitcast=True))
    code = tl.where(x < 0.015625, small.to(tl.int32, bitcast=True) - 0x46800000, (normal >> 20) - 960)
    return tl.where(x == x, held, x), tl.where(x == x, code, 0x7F)


@triton.jit
def e2m1_of(x):
    """Codes of float32 in e2m1, as integers: to the nearest, ties to even; NaN gives what its bits do by that."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    magnitude = size.to(tl.float32, bitcast=True)
    small = (magnitude + 4194304.0).to(tl.int32, bitcast=True) - 0x4A800000
    normal = ((size - 0x3EE00001 + ((size >> 22) & 1)) >> 22) & 0xFF
    code = tl.where(magnitude >= 6.0, 7, tl.where(magnitude < 1.0, small, normal))
    return code | ((bits >> 28) & 8)


@triton.jit
def store_pairs(codes, y_ptr, row, first, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Stores codes of rows [ROWS, groups, GROUP], BLOCK of them a row from column `first` on, two a byte: the first of
    two in its low half.
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
    """Rows [ROWS, COLUMNS] from column `first` on, as DTYPE, as [ROWS, groups, GROUP] with zeros outside, and
    where they are put, [ROWS, COLUMNS]: elements from the first one, and which of these there are.
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
    """clamp(amax(|y|) / MOST, min_scale, max_scale) over the last dimension of y, in float32, NaN where y has one; the
    quotient rounded to y's dtype or not, the largest bounded by what is at a pointer or not. Unless it OVERFLOWS, there
    is no max_scale.
    """
    largest = largest_bits(y, NVIDIA).to(tl.float32, bitcast=True)
    if IS_BOUNDED:
        upper = tl.load(upper_ptr).to(tl.float32)
        largest = tl.where(largest > upper, upper, largest)
        largest = tl.where(upper == upper, largest, upper)
    if NVIDIA and y.dtype != tl.float32 and not IS_BOUNDED:
        # To the nearest of all numbers of 16 bits, by the remainder as in `quotient`.
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
        # The instruction is off by up to two: one step of Newton's method, which makes NaN of 0 and infinity.
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
    """total * rsqrt(mean(total^2) + eps) * weight of rows [ROWS, BLOCK], float32, 0 beyond WIDTH; as DTYPE where it is
    rounded before, too.
    """
    mean = tl.sum(total * total, axis=1) / WIDTH
    y = total * reciprocal_root(mean + eps, NVIDIA)[:, None]
    if ROUNDS_NORMED:
        y = rounded(y, DTYPE)
    # Widened behind the change of its layout, which then moves half as many bytes.
    weight = widened(weight[None, :], NVIDIA)
    if ADDS_ONE:
        weight = weight + 1.0
    y *= weight
    if ROUNDS_NORMED:  # the compiler then multiplies two numbers of 16 bits at a time
        y = y.to(DTYPE)
    return y
