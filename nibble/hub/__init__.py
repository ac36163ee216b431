"""Models and data sets from Hugging Face and ModelScope, through their own libraries, into home: whole or not at all.

Promises that nothing stands under a name before every size and every hash that the hub gives is verified, that
a try after a cut keeps what had arrived, that a token is read from the environment or from a file only its owner can
read and shows up nowhere else, and that whatever goes wrong is one sentence and what to do. Imports the hubs'
libraries only when they are used, and never torch. Knows nothing of the page, the console and jobs.
"""

from nibble.hub.downloads import Plan, Request, default_name, download, plan
from nibble.hub.faults import DownloadError, HubUnavailable
from nibble.hub.source import Listing, Progress, RemoteFile

__all__ = [
    "DownloadError",
    "HubUnavailable",
    "Listing",
    "Plan",
    "Progress",
    "RemoteFile",
    "Request",
    "default_name",
    "download",
    "plan",
]
