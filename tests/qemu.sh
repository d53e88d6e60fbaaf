#!/usr/bin/env bash
# Runs the operator tests on an emulated ARM processor: tests/qemu.sh [OPTIONS OF PYTEST]
#
# Needs Debian 12 on x86-64 with qemu-user-static, g++-aarch64-linux-gnu and pip. ARM's Python and wheels come from
# Debian and PyPI, once, into the folder ARM_ROOT (build/arm); nothing is installed. ARM_CPU names the processor:
# neoverse-n1 (default) has the dot product, cortex-a72 has not. What is fast here says nothing about real ones.
# QWEN_PLUGIN_LIBRARY names a library or a wheel to test, such as that of `make dist`; then nothing is compiled and
# g++-aarch64-linux-gnu is not needed.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$(realpath -m "${ARM_ROOT:-build/arm}")
given=${QWEN_PLUGIN_LIBRARY:-}
export QWEN_PLUGIN_LIBRARY=${given:-$root/libqwen_plugin.so} CXX=aarch64-linux-gnu-g++

arm_python() {
  PYTHONPATH=$root/site qemu-aarch64-static -cpu "${ARM_CPU:-neoverse-n1}" -L "$root" "$root/usr/bin/python3.11" "$@"
}

if ! [ -d "$root/site" ]; then
  apt=$root/apt # a package manager's state of its own, that knows of ARM alone
  mkdir -p "$apt/state/lists/partial" "$apt/archives/partial" "$root/proc"
  touch "$apt/status"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main" \
    >"$apt/sources.list"
  options=(-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root
    -o Dir::State="$apt/state" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt"
    -o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=/nonexistent)
  apt-get "${options[@]}" update
  apt-get "${options[@]}" install --yes --download-only --no-install-recommends python3.11 libstdc++6
  for package in "$apt"/archives/*.deb; do dpkg -x "$package" "$root"; done
  # ONNX Runtime reads about the processor there, and does not survive an x86's.
  printf 'processor\t: %d\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n\n' 0 1 >"$root/proc/cpuinfo"
  python3 -m pip install --quiet --target "$root/wheels" --constraint constraints.txt --python-version 3.11 \
    --only-binary=:all: --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
    hypothesis ml_dtypes numpy onnx onnxruntime pytest pytest-timeout
  mv "$root/wheels" "$root/site"
fi
[ -n "$given" ] || arm_python -m qwen_plugin.compile --output "$QWEN_PLUGIN_LIBRARY"
arm_python -m pytest --noconftest -p no:cacheprovider -o timeout=7200 tests/qwen_plugin/test_{attention*,embedding,linear,linear_mistakes,moe,moe_mistakes,same_bits}.py "$@"
