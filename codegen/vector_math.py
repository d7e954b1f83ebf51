"""Exponentials and the like in C++ that a compiler makes vectors of: no branches, no calls, no tables.

Each is a polynomial near zero, and follows from an exponential elsewhere. The polynomials are fitted to least relative
error; ``ULPS`` bounds the error of the results, in units of the last place of float32, for all numbers that are not
subnormal. NaN and infinities go where they go in the C library.
What GELU takes of each number is near enough where its error is small beside 1, which one polynomial does.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten

ULPS = {aten.exp: 1.1, aten.tanh: 1.5, aten.erf: 1.1}
"""How far results are from exact ones at most."""

NAMES = {aten.exp: "exponential", aten.tanh: "tangent", aten.erf: "error_function", aten.log: "__builtin_logf"}
"""What functions are called in C++; logarithms are those of the C library, which takes them one by one."""

SOURCE = """\
static inline float bits_to_float(int bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }

// e^x as 2^n * (1 + p), of which it is p that is given, for x at which that does not overflow.
static inline float fraction(float x, float n) {
    const float r = __builtin_fmaf(n, 1.90465421e-9f, __builtin_fmaf(n, -0.693147182f, x));
    float p = 0.0013950599823147058f;
    p = __builtin_fmaf(p, r, 0.008368954062461853f);
    p = __builtin_fmaf(p, r, 0.04166620597243309f);
    p = __builtin_fmaf(p, r, 0.166665181517601f);
    p = __builtin_fmaf(p, r, 0.5f);
    return __builtin_fmaf(p * r, r, r);
}

// In two steps, for results that are subnormal.
static inline float exponential(float x) {
    const float within = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;
    const float n = __builtin_rintf(within * 1.44269502f);
    const int whole = (int)n, half = whole >> 1;
    const float first = bits_to_float((half + 127) << 23), second = bits_to_float((whole - half + 127) << 23);
    const float scaled = (fraction(within, n) + 1.0f) * first * second;
    return x == x ? scaled : x;
}

// The same between -87 and 87.
static inline float near_exponential(float x) {
    const float n = __builtin_rintf(x * 1.44269502f);
    return (fraction(x, n) + 1.0f) * bits_to_float(((int)n + 127) << 23);
}

static inline float tangent(float x) {
    const float t = __builtin_fabsf(x), z = x * x, u = t < 40.0f ? t : 40.0f;
    float p = -0.005704990588128567f;
    p = __builtin_fmaf(p, z, 0.02063908986747265f);
    p = __builtin_fmaf(p, z, -0.05373971536755562f);
    p = __builtin_fmaf(p, z, 0.13331441581249237f);
    p = __builtin_fmaf(p, z, -0.3333328068256378f);
    const float near = __builtin_fmaf(p * z, x, x);
    const float far = __builtin_copysignf(1.0f - 2.0f / (near_exponential(u + u) + 1.0f), x);
    return t < 0.625f || x != x ? near : far;
}

// Beyond 1 it is 1 - e^-q, where q is a polynomial of the distance from 0.
static inline float error_function(float x) {
    const float t = __builtin_fabsf(x), z = x * x, u = t < 4.0f ? t : 4.0f;
    float p = 7.854009163565934e-05f;
    p = __builtin_fmaf(p, z, -0.0008010242017917335f);
    p = __builtin_fmaf(p, z, 0.005188333801925182f);
    p = __builtin_fmaf(p, z, -0.026853814721107483f);
    p = __builtin_fmaf(p, z, 0.1128358542919159f);
    p = __builtin_fmaf(p, z, -0.3761262595653534f);
    p = __builtin_fmaf(p, z, 0.12837916612625122f);
    const float near = __builtin_fmaf(p, x, x);
    float q = 1.3962444427306764e-05f;
    q = __builtin_fmaf(q, u, -0.00035059204674325883f);
    q = __builtin_fmaf(q, u, 0.003757476806640625f);
    q = __builtin_fmaf(q, u, -0.024010069668293f);
    q = __builtin_fmaf(q, u, 0.10653086751699448f);
    q = __builtin_fmaf(q, u, 0.6349695324897766f);
    q = __builtin_fmaf(q, u, 0.1286943405866623f);
    const float far = __builtin_copysignf(1.0f - near_exponential(-__builtin_fmaf(q, u, u)), x);
    return t < 1.0f || x != x ? near : far;
}

// How much of a standard normal distribution lies below x: e^-q of it, or all but that.
static inline float normal_below(float x) {
    const float t = __builtin_fabsf(x);
    float p = 1.6184527567020268e-06f;
    p = __builtin_fmaf(p, t, -2.3385151507682167e-05f);
    p = __builtin_fmaf(p, t, 0.00011179986177012324f);
    p = __builtin_fmaf(p, t, 0.000132879737066105f);
    p = __builtin_fmaf(p, t, -0.004939967300742865f);
    p = __builtin_fmaf(p, t, 0.03641352429986f);
    p = __builtin_fmaf(p, t, 0.3182919919490814f);
    p = __builtin_fmaf(p, t, 0.7978858947753906f);
    const float q = __builtin_fmaf(p, t, 0.693147182f), within = q < 87.0f ? q : 87.0f;
    const float tail = q < 87.0f ? near_exponential(-within) : 0.0f;
    return x < 0 ? tail : x == x ? 1.0f - tail : x;
}
"""
