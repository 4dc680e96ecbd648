"""Run-time settings that every recipe card shares; a card sets what differs."""
default_hooks = dict(
    runtime_info=dict(type="RuntimeInfoHook"),
    iteration_seed=dict(type="IterationSeedHook"),
    timer=dict(type="IterTimerHook"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    throughput=dict(type="ThroughputHook"),
    replaced_images=dict(type="ReplacedImagesHook"),
    progress=dict(type="ProgressHook"),
    divergence=dict(type="DivergenceHook"),
    stop=dict(type="StopHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=3),
)
custom_hooks = []
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=True,
                     mean_pattern=r".*(loss|time|data_time|grad_norm|images_per_s|tokens|fill).*")
log_level = "INFO"
# Scalars as JSON lines; TensorBoard is added where it is installed.
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
randomness = dict(seed=0)
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0))
work_dir = None                    # work_dirs/<name of the config>
load_from = None                   # weights to start from: .pth or .safetensors
load_from_strict = True            # weights that fill under 90 % of the model are an error
load_from_part = None              # the part that they are loaded into, such as "backbone"; None: all of the model
resume = False
launcher = "none"
