// The operators over quantised weights.
#pragma once
#include "ort_abi.h"

const OrtCustomOp* QuantLinearOperator(const OrtApi& api);
const OrtCustomOp* QuantEmbeddingOperator(const OrtApi& api);
