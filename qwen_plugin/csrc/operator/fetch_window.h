// Memory is fetched in windows of eight pages, a line or two of each in turn: a processor waits for more lines at once
// if they are of several pages, and reads 1.5 times as fast as one line after the other.
#pragma once
#include <cstdint>

constexpr int64_t kLineBytes = 64, kPageBytes = 4096, kWindowPages = 8, kWindowBytes = kWindowPages * kPageBytes;
