# Read by CMake where llama.cpp's own project begins (CMAKE_PROJECT_llama.cpp_INCLUDE): leaves out the library of
# its command-line programs, which llama-cpp-python asks for and does not install. Nearly half of the time.
set(LLAMA_BUILD_COMMON OFF)
