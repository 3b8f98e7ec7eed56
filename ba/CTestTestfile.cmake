# CMake generated Testfile for 
# Source directory: /tmp/i5/native
# Build directory: /tmp/i5/ba
# 
# This file includes the relevant testing commands required for 
# testing this directory and lists subdirectories to be tested as well.
subdirs("tests")
