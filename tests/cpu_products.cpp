// The products of csrc/cpu against plain loops. Prints one line per mistake.
//
// Compiled by test_cpu_products.py with vectors of each width that an instruction set has: the compiler cuts
// wider ones than the processor has into pieces.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/products.h"

using namespace camkernels::cpu;

namespace {

int mistakes = 0;

template <typename Real>
std::vector<Real> random_numbers(size_t count) {
  static std::mt19937 draw(0);
  std::vector<Real> values(count);
  for (Real& value : values) value = static_cast<Real>(static_cast<int>(draw() % 9) - 4);
  return values;
}

// All sums are of small whole numbers, exact in every order.
template <typename Real>
void expect(const char* what, const std::vector<Real>& found, const std::vector<Real>& wanted, int64_t m,
            int64_t n, int64_t k) {
  if (found == wanted) return;
  ++mistakes;
  std::printf("%s %zu bytes, %d lanes: %ld x %ld x %ld\n", what, sizeof(Real), Lanes<Real>::kCount, m, n, k);
}

template <typename Real>
void check_dots(int64_t m, int64_t n, int64_t k, bool overwrite) {
  const int64_t a_stride = k + 3, b_stride = k + 5, row_stride = n + 2;
  const auto a = random_numbers<Real>(m * a_stride), b = random_numbers<Real>(n * b_stride);
  auto found = random_numbers<Real>(m * row_stride);
  auto wanted = found;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      Real sum = overwrite ? Real(0) : wanted[i * row_stride + j];
      for (int64_t t = 0; t < k; ++t) sum += a[i * a_stride + t] * b[j * b_stride + t];
      wanted[i * row_stride + j] = sum;
    }
  }
  dots<Real>(a.data(), a_stride, b.data(), b_stride, found.data(), row_stride, 1, m, n, k, nullptr, overwrite,
             Nothing{});
  expect("dots", found, wanted, m, n, k);
}

template <typename Real>
void check_panel(int64_t m, int64_t n, int64_t k, bool overwrite) {
  const int64_t a_stride = k + 2, b_stride = n + 3, row_stride = n + 1;
  const auto a = random_numbers<Real>(m * a_stride), b = random_numbers<Real>(k * b_stride);
  auto found = random_numbers<Real>(m * row_stride);
  auto wanted = found;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      Real sum = overwrite ? Real(0) : wanted[i * row_stride + j];
      for (int64_t t = 0; t < k; ++t) sum += a[i * a_stride + t] * b[t * b_stride + j];
      wanted[i * row_stride + j] = sum;
    }
  }
  panel<Real>({a.data(), a_stride, 1}, b.data(), b_stride, found.data(), row_stride, m, k, n, nullptr,
              overwrite);
  expect("panel", found, wanted, m, n, k);
}

template <typename Real>
void check_product(int64_t m, int64_t vectors, int64_t k, bool overwrite) {
  const int64_t n = vectors * Lanes<Real>::kCount, b_stride = n + 1, out_stride = n + 3;
  const auto a = random_numbers<Real>(m * k), b = random_numbers<Real>(k * b_stride);
  auto found = random_numbers<Real>(m * out_stride);
  auto wanted = found;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      Real sum = overwrite ? Real(0) : wanted[i * out_stride + j];
      for (int64_t t = 0; t < k; ++t) sum += a[t * m + i] * b[t * b_stride + j];
      wanted[i * out_stride + j] = sum;
    }
  }
  product<Real>({a.data(), 1, m}, b.data(), b_stride, found.data(), out_stride, m, k, n, overwrite,
                Nothing{});
  expect("product", found, wanted, m, n, k);
}

template <typename Real>
void check_transpose(int64_t rows, int64_t columns) {
  const int64_t from_stride = columns + 1, to_stride = rows + 2;
  const auto from = random_numbers<Real>(rows * from_stride);
  auto found = random_numbers<Real>(columns * to_stride);
  auto wanted = found;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) wanted[j * to_stride + i] = from[i * from_stride + j];
  }
  transpose(from.data(), from_stride, found.data(), to_stride, rows, columns);
  expect("transpose", found, wanted, rows, columns, 0);
}

template <typename Real>
void check_all() {
  for (const bool overwrite : {true, false}) {
    for (int64_t m = 1; m <= 14; ++m) {
      for (int64_t n = 1; n <= 26; ++n) {
        for (const int64_t k : {1, 5, 16, 37, 150}) check_dots<Real>(m, n, k, overwrite);
      }
      for (const int64_t n : {1, 9, 49, 127, 128, 200}) {
        for (const int64_t k : {1, 8, 13}) check_panel<Real>(m, n, k, overwrite);
      }
      for (int64_t vectors = 1; vectors <= 9; ++vectors) check_product<Real>(m, vectors, 11, overwrite);
    }
  }
  for (const bool overwrite : {true, false}) check_panel<Real>(1, 2100, 19, overwrite);
  for (const int64_t rows : {1, 7, 8, 16, 33}) {
    for (int64_t columns = 1; columns <= 50; ++columns) check_transpose<Real>(rows, columns);
  }
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  return mistakes != 0;
}
