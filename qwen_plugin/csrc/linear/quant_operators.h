// The operators over quantised weights.
#pragma once
#include "operator/ort_abi.h"
#include "operator/threads.h"

// Declarations for the sessions whose threads these are. ONNX Runtime keeps pointers to them: never freed.
const OrtCustomOp* NewQuantLinear(const OrtApi& api, SessionThreads& threads);
const OrtCustomOp* NewQuantEmbedding(const OrtApi& api, SessionThreads& threads);
