#pragma once
#include "operator/ort_abi.h"
#include "operator/threads.h"

// The declaration for the sessions whose threads these are. ONNX Runtime keeps a pointer to it: never freed.
const OrtCustomOp* NewMoE(const OrtApi& api, SessionThreads& threads);
