// GEMM on raw memory, callable from any thread: torch's CPU kernel without dispatcher or autograd.
#pragma once
#include <memory>

#include "common.h"

namespace u2a {

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, cols, row_stride, col_stride;

  Matrix(T* p, int64_t r, int64_t c, int64_t ld)
      : data(p), rows(r), cols(c), row_stride(ld), col_stride(1) {}
  Matrix transposed() const {
    Matrix m = *this;
    std::swap(m.rows, m.cols);
    std::swap(m.row_stride, m.col_stride);
    return m;
  }
};

template <typename T>
Tensor view_of(const Matrix<T>& m) {
  const int64_t sizes[] = {m.rows, m.cols}, strides[] = {m.row_stride, m.col_stride};
  const int32_t type = sizeof(T) == 8 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<std::remove_const_t<T>*>(m.data), 2, sizes, strides, 0, type,
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// out = a b
template <typename T>
void gemm(const Matrix<T>& out, const Matrix<const T>& a, const Matrix<const T>& b) {
  Tensor o = view_of(out), l = view_of(a), r = view_of(b);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(o.get(), l.get(), r.get()));
}

// out += a b
template <typename T>
void gemm_add(const Matrix<T>& out, const Matrix<const T>& a, const Matrix<const T>& b) {
  Tensor o = view_of(out);
  addmm_(o, view_of(a), view_of(b));
}

template <typename T>
std::unique_ptr<T[]> scratch(int64_t elements) {
  return std::unique_ptr<T[]>(new T[elements]);
}

}  // namespace u2a
