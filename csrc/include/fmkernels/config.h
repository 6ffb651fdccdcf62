// Macros that let the same templates serve host code, every instruction set, and device code.
//
// FMKERNELS_ISA names the instruction set a file is compiled for. Everything that such a file
// includes lives in a namespace of that name: an inline function or template that three object
// files define under one name would be merged by the linker, and the copy that it keeps might be
// the AVX-512 one.
#pragma once

#ifndef FMKERNELS_ISA
#define FMKERNELS_ISA generic
#endif

#define FMKERNELS_NAMESPACE_BEGIN \
  namespace fmkernels {           \
  namespace FMKERNELS_ISA {
#define FMKERNELS_NAMESPACE_END \
  }                             \
  }

#ifdef __CUDACC__
#define FMKERNELS_INLINE __host__ __device__ __forceinline__
#else
#define FMKERNELS_INLINE inline __attribute__((always_inline))
#endif
