// Functions that Python calls through ctypes: plain C, a status for a result, and nothing thrown or allocated.
#pragma once

#define OCTAVO_EXPORT extern "C" __attribute__((visibility("default")))
