/* The kernels of ops/common/fused.py: all of a training step between its matrix products, forward and backward, each in
   one pass over memory. Each file holds one family of kernels; they are compiled as one unit.

   There are B sequences of T positions; a row is one position of one sequence. Inputs and outputs of matrix products
   have `type` float32 or bfloat16, all other numbers are float32. A sum over rows is computed for each of PARTS parts
   (set by fused.py) or for each sequence, and the caller adds these up. So its bits do not depend on the number of
   threads. */

#include "ops/common/norm_shift.c"
#include "ops/rwkv1/time_mix.c"
#include "ops/common/lags.c"
#include "ops/common/gates.c"
#include "ops/common/scale.c"
