// Best approximations of the logarithm by poles, for the von Neumann entropy of float32 matrices.
// Included inside an instruction-set namespace after plan.h.
//
// As in mmae_fast/backends/rational.py, for x in [0, 1]
//
//     -x log x ≈ b x + sum_p w_p x / (x + u_p),        |error| <= 1e-8,
//
// so that a matrix rho with spectrum in [0, c] has, with B = rho / c and X_p = (B + u_p I)⁻¹,
//
//     H = c sum_p w_p (k - u_p tr X_p) + (b - log c) tr rho,
//     V = dH / d rho = F - tr(rho F) I,    F = sum_p w_p X_p ≈ -log B + multiples of I:
//
// the derivative of H is -log rho - H I with tr(rho V) = 0, so that b, c and most of the error
// cancel. The error of log x, 1e-8 / x, is below what rounding of rho to float32 does to it, 6e-8 /
// x.

// Whether neither H nor V takes eigenvalues: the approximation is one for float32.
template <class T>
constexpr bool by_poles(double alpha) {
  return sizeof(T) == 4 && alpha == 1;
}

// 12 poles (python -m benchmarks.rational).
constexpr int kPoles = 12;
constexpr double kPoleShift[kPoles] = {
    1.64068667856157e-07, 3.01075375829246e-06, 2.51307886684058e-05, 0.000145487058163255,
    0.000673436845898288, 0.00267153968874276,  0.0094681103045413,   0.0309183809928875,
    0.0960884476443772,   0.299548965309168,    1.06258122853185,     6.88947221034193};
constexpr double kPoleWeight[kPoles] = {
    6.08474229520899e-07, 7.21111034853513e-06, 4.78661338297228e-05, 0.000236982915452072,
    0.000974256858869363, 0.00351578515442211,  0.0115463792520441,   0.0356323185681541,
    0.107951129890304,    0.350150866610075,    1.51128326017592,     18.5455049685664};
constexpr double kPoleSlope = -3.50208168794121;

// Noise below zero may be as large as this part of c: 1 / (x + u) is not to be had beyond.
constexpr double kLeastShift = kPoleShift[0] / 4;

// Values of c that are tried, each twice the one before. Noise that asks for more is not the
// rounding of a positive semidefinite matrix: what is below zero would have to count as zero, which
// takes eigenvalues.
constexpr int kTries = 5;

// Entries of an inverse far from the diagonal vanish; on the way numbers too small to be normal
// would cost an interruption each.
struct FlushToZero {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  FlushToZero() { _mm_setcsr(before | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before); }
#endif
};
