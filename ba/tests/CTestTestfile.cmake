# CMake generated Testfile for 
# Source directory: /tmp/i5/native/tests
# Build directory: /tmp/i5/ba/tests
# 
# This file includes the relevant testing commands required for 
# testing this directory and lists subdirectories to be tested as well.
add_test([=[test_kernels]=] "qemu-aarch64" "-L" "/usr/aarch64-linux-gnu" "/tmp/i5/ba/tests/test_kernels")
set_tests_properties([=[test_kernels]=] PROPERTIES  _BACKTRACE_TRIPLES "/tmp/i5/native/tests/CMakeLists.txt;6;add_test;/tmp/i5/native/tests/CMakeLists.txt;0;")
add_test([=[test_engine]=] "qemu-aarch64" "-L" "/usr/aarch64-linux-gnu" "/tmp/i5/ba/tests/test_engine")
set_tests_properties([=[test_engine]=] PROPERTIES  _BACKTRACE_TRIPLES "/tmp/i5/native/tests/CMakeLists.txt;6;add_test;/tmp/i5/native/tests/CMakeLists.txt;0;")
