// The settings of a product and the kernels that compute it.
#include "linear/product.h"

#include "operator/instruction_set.h"

namespace quant_linear {
namespace {

const Kernels& ChooseVectorKernels() {
#if defined(__x86_64__)
  const InstructionSet set = ChooseInstructionSet();
  if (set == InstructionSet::kAvx512) return kAvx512VnniKernels;
  if (UsesExtension(Extension::kAvxVnni)) return kAvxVnniKernels;
  if (set == InstructionSet::kAvx2) return kAvx2Kernels;
#elif defined(__aarch64__)
  if (UsesExtension(Extension::kNeonDot)) return kNeonDotKernels;
#endif
  return kPlainKernels;
}

// Whether kAmxBlockKernels take it: its blocks of 128 columns have one scale of the activations, and weights that are
// whole numbers of a unit, bytes with a sign.
bool FitsBlockTiles(const Problem& p) {
  return p.block_groups * p.group_size == kBlockColumns && (p.bits < 8 || p.symmetric);
}

// Rows from which the tiles of AMX are faster than vectors, measured.
int64_t LeastTileRows(const Problem& p) {
  const bool one_byte = Planes(p) == 1;
  if (!FitsBlockTiles(p)) return one_byte ? 10 : 8;
  return one_byte ? (p.block_groups > 1 ? 8 : 9) : 6;
}

// The kernels for so many rows and more.
const Kernels& ChooseTileKernels(const Problem& p) {
#if defined(__x86_64__)
  if (p.precision != Precision::kFloat32 && UsesExtension(Extension::kAmx))
    return FitsBlockTiles(p) ? kAmxBlockKernels : kAmxKernels;
#endif
  return ChooseVectorKernels();
}

}  // namespace

Problem ReadProduct(const operators::Attributes& attributes, const char* prefix, int64_t out_features,
                    int64_t in_features) {
  Problem p = {};
  const std::string before = prefix, scales_name = before + "activation_scales", precision_name = before + "precision";
  const std::string scales = attributes.String(scales_name.c_str());
  static_cast<QuantWeight&>(p) = ReadWeight(attributes, prefix, out_features, in_features, scales == "block");
  const std::string precision = attributes.String(precision_name.c_str());
  if (precision == "int8")
    p.precision = Precision::kInt8;
  else if (precision == "int8x2")
    p.precision = Precision::kInt8x2;
  else if (precision == "float32")
    p.precision = Precision::kFloat32;
  else
    attributes.Refuse(precision_name.c_str(), "'" + precision + "'", "int8, int8x2 or float32");
  if (scales == "block")
    p.activation_scales = ActivationScales::kBlock;
  else if (scales == "token")
    p.activation_scales = ActivationScales::kToken;
  else if (scales == "static")
    p.activation_scales = ActivationScales::kStatic;
  else if (!scales.empty() && scales != "group")
    attributes.Refuse(scales_name.c_str(), "'" + scales + "'", "group, block, token or static");
  return p;
}

KernelChoice ChooseKernels(const Problem& settings) { return {&ChooseVectorKernels(), &ChooseTileKernels(settings)}; }

const Kernels& KernelChoice::Of(const Problem& p) const { return p.rows < LeastTileRows(p) ? *few : *many; }

}  // namespace quant_linear
