"""Named in pytest.ini: imported before anything else of the project is."""

import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from leave_mark import leave_mark

leave_mark("plugin")
