// What libtorch throws, as an error that crosses the seam.
#pragma once

#include "shim.h"

#include <cstdlib>
#include <cstring>
#include <exception>

#include <c10/util/Exception.h>

inline void set_error(ps_error* error, ps_fault fault, const char* text) {
  // The first line says what happened; what follows is libtorch's own stack.
  const char* end = std::strchr(text, '\n');
  const size_t bytes = end == nullptr ? std::strlen(text) : static_cast<size_t>(end - text);
  error->fault = fault;
  error->message = static_cast<char*>(std::malloc(bytes + 1));
  if (error->message != nullptr) {
    std::memcpy(error->message, text, bytes);
    error->message[bytes] = '\0';
  }
}

// Runs `body`; what it throws becomes an error.
template <typename Body>
bool guarded(ps_error* error, ps_fault otherwise, Body&& body) {
  try {
    body();
    return true;
  } catch (const c10::OutOfMemoryError& e) {
    set_error(error, PS_FAULT_OUT_OF_MEMORY, e.what_without_backtrace());
  } catch (const c10::IndexError& e) {
    set_error(error, PS_FAULT_INPUT, e.what_without_backtrace());
  } catch (const c10::ValueError& e) {
    set_error(error, PS_FAULT_INPUT, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    set_error(error, otherwise, e.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    set_error(error, PS_FAULT_OUT_OF_MEMORY, "the host is out of memory");
  } catch (const std::exception& e) {
    set_error(error, otherwise, e.what());
  } catch (...) {
    set_error(error, otherwise, "an exception of unknown type");
  }
  return false;
}
