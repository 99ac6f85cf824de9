// The parts of the check, each of which prints what it finds and tells whether all is sound.
#pragma once

bool check_rows();
