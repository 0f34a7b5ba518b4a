/* float16 by its bits, for processors without an instruction for it; included by _native.c. */

static inline float from_half(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13, scale = 0x77800000u; /* 2^112 */
    float value, factor;
    memcpy(&value, &bits, 4);
    memcpy(&factor, &scale, 4);
    value *= factor; /* exact for subnormal numbers too */
    memcpy(&bits, &value, 4);
    if (value >= 65536.0f) bits |= 0x7f800000u; /* infinity and NaN */
    bits |= (uint32_t)(half & 0x8000) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x47800000u) return (uint16_t)(sign | 0x7c00); /* from 65,536 on */
    if (bits < 0x38800000u) { /* subnormal: the addition rounds at the right bit */
        float small = fabsf(value) + 0.5f;
        memcpy(&bits, &small, 4);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    return (uint16_t)(sign | ((bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13));
}
