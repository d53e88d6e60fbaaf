#pragma once
#include <stdexcept>

// Something the graph or its feeds got wrong; becomes an error status at the C ABI.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
