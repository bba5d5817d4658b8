"""The table of kinds."""

from campaign.attempts import Kind

_LARGEST_IMAGE = 800  # A damaged header can ask for as many pixels as Pillow allows, of 4 bytes: 716 MB.

_ALL = (
    Kind("killed_runs", "campaign.kills", "training", seconds=1200, runs_processes=True),
    Kind("killed_builds", "campaign.kills", "builds", seconds=1200, runs_processes=True),
    Kind("runs_on_full_disks", "campaign.full_disks", "training", seconds=600, runs_processes=True, mounts=True),
    Kind("service_requests", "campaign.http_requests", "requests", seconds=180, megabytes=1500),  # prepared the longest
    Kind("commands_on_full_disks", "campaign.full_disks", "commands", seconds=60, mounts=True),
    Kind("jsonl_lines", "campaign.data_files", "lines"),
    Kind("compressed_jsonl", "campaign.data_files", "compressed"),
    Kind("packed_files", "campaign.data_files", "packed"),
    Kind("jsonl_indexes", "campaign.data_files", "indexes"),
    Kind("run_directories", "campaign.checkpoint_files", "run_directories"),
    Kind("states_without_checksums", "campaign.checkpoint_files", "states"),
    Kind("exported_models", "campaign.checkpoint_files", "exports"),
    Kind("tokenizers", "campaign.checkpoint_files", "tokenizers"),
    Kind("foreign_safetensors", "campaign.checkpoint_files", "foreign_weights"),
    Kind("json_settings", "campaign.settings_files", "settings"),
    Kind("pickled_settings", "campaign.settings_files", "pickles"),
    Kind("images", "campaign.media_files", "image_files", megabytes=_LARGEST_IMAGE),
    Kind("tars", "campaign.media_files", "tar_files"),
    Kind("videos", "campaign.media_files", "video_files"),
)
KINDS = {kind.name: kind for kind in _ALL}
