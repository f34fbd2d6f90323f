BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0012');
CREATE TABLE api_keys (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	scopes JSON NOT NULL, 
	secret_sha256 VARCHAR(64) NOT NULL, 
	created_at DATETIME NOT NULL, 
	expires_at DATETIME, 
	revoked_at DATETIME, 
	last_used_at DATETIME, 
	replaced_by VARCHAR(40), 
	CONSTRAINT pk_api_keys PRIMARY KEY (id)
);
INSERT INTO "api_keys" VALUES('key_age8k5618nvdjgmecl3rh0y5od','ann','key','["read"]','c6aaf6b082cbb744732067bd6bb793032ec4008595c4ab1ed641f466cbe294ac','2026-11-27 03:15:59.732000',NULL,NULL,NULL,NULL);
CREATE TABLE artifacts (
	id VARCHAR(40) NOT NULL, 
	job_id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	name VARCHAR(100) NOT NULL, 
	media_type VARCHAR(100) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	epoch BIGINT NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_artifacts PRIMARY KEY (id), 
	CONSTRAINT fk_artifacts_job_id FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE, 
	CONSTRAINT uq_artifacts_job_id UNIQUE (job_id, name)
);
INSERT INTO "artifacts" VALUES('art_4xqagdslprui319dmrs5owj6l1','job_3va21w4kp0lkpd8c5jh71jw911','local','model.onnx','application/octet-stream',12,'d4ce2c527afe674c7a086bd74e256019e3d5dcdb31eeb6eaadef5ada8c4383b9',1,'2026-11-27 03:16:00.186000');
CREATE TABLE audit (
	id VARCHAR(40) NOT NULL, 
	created_at DATETIME NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	key_id VARCHAR(40), 
	action VARCHAR(60) NOT NULL, 
	target VARCHAR(200), 
	request_id VARCHAR(64), 
	status INTEGER, 
	outcome VARCHAR(10) NOT NULL, 
	CONSTRAINT pk_audit PRIMARY KEY (id)
);
INSERT INTO "audit" VALUES('aud_aejno7lfa9q216agmhts88e3a1','2026-11-27 03:15:59.459000','local',NULL,'upload_model','mdl_588mqd4pqk3rfx7r29gl379mnz','39811e0d3aa74b149bf6119c966ac096',201,'done');
INSERT INTO "audit" VALUES('aud_nf6bdub747b3g5cwgdw769thl5','2026-11-27 03:15:59.541000','local',NULL,'upload_model','mdl_xtv854px5wpni711eic3gxwjdm','a4b4213b2abc47f2acfb19e9a1e9d76b',201,'done');
INSERT INTO "audit" VALUES('aud_hs7xi54p43q5ianlomnnewknfp','2026-11-27 03:15:59.609000','local',NULL,'upload_dataset','dst_85on8ijja4bx2r4u0c10m1ydnv','c472ea5d5d9f4f249d9ec38ce4df9f41',201,'done');
INSERT INTO "audit" VALUES('aud_jxki60kuqlvs97nb9v9dtu0fkm','2026-11-27 03:15:59.683000','local',NULL,'create_webhook','whk_e8ds0d8jzbvgkrfl71h9m9o13j','bb6a6fd1ec50441e898f6a855ee0f7e5',201,'done');
INSERT INTO "audit" VALUES('aud_2ulcwng1qhr4k4obcdjc7fvqf3','2026-11-27 03:15:59.720000','local',NULL,'set_quota','local','171046e7023e4e06a09ef28b1fc22dfa',200,'done');
INSERT INTO "audit" VALUES('aud_jdzhuycrl00zpndn5pbx42a6ge','2026-11-27 03:15:59.735000','local',NULL,'create_key','key_age8k5618nvdjgmecl3rh0y5od','f3ee7d3ef83143ebbd426a8a1dd5850d',201,'done');
INSERT INTO "audit" VALUES('aud_li9nnu2ceny36p9gwlvwzgqx2j','2026-11-27 03:15:59.750000','local',NULL,'begin_upload','upl_ktk7uy3f9crf4c7w0iw8egtj1x','8e74268c90da4218a9c5c14dd678d2ec',201,'done');
INSERT INTO "audit" VALUES('aud_5zv6gpdkijwku8dt9fczfb6066','2026-11-27 03:15:59.792000','local',NULL,'append_to_upload','upl_ktk7uy3f9crf4c7w0iw8egtj1x','6088210632604fdaa6d1d5800841f3f9',204,'done');
INSERT INTO "audit" VALUES('aud_pvf2jt5dxyfhuy2ljkocd4w1mz','2026-11-27 03:15:59.847000','local',NULL,'submit_job','job_3va21w4kp0lkpd8c5jh71jw911','971652c3cb3e416aa843dc22c916e7c9',202,'done');
INSERT INTO "audit" VALUES('aud_eqa5sgpbjuc73wlkdbr50ro0t2','2026-11-27 03:15:59.875000','local',NULL,'submit_job','job_c91qiqiueqvwcjm25hvqguxwgu','8d24c02d6219495b8414d7b7f7200258',202,'done');
INSERT INTO "audit" VALUES('aud_tbo7zi40qx5w04yqwoonxeg94y','2026-11-27 03:15:59.917000','local',NULL,'submit_job','job_rseh6zjt6gwwr4qc1xtub9sfrm','c5db632476544fb0ae36074490895bd9',202,'done');
INSERT INTO "audit" VALUES('aud_eubdvfg757kn1cuwc6juimv5y4','2026-11-27 03:15:59.963000','local',NULL,'submit_job','job_lpzdpiskrsmyxyy33cvoe2gdq6','b12c882faafa4a918760841b182f44f0',202,'done');
INSERT INTO "audit" VALUES('aud_whb5slpzs8khxm0vivpnsnkabm','2026-11-27 03:15:59.988000','local',NULL,'submit_job','job_4m7p5q60rc799d60v31s6pzmb2','efba5a27e0354bdca8ab04b678fd27fd',202,'done');
INSERT INTO "audit" VALUES('aud_jvntk92dzlr4hqzs7emmghzrva','2026-11-27 03:16:00.037000','local',NULL,'submit_distillation','job_ceo8eci416mtejp77vtad4m3du','cbef7324a3644b6890b8269e0975c90d',202,'done');
INSERT INTO "audit" VALUES('aud_59n5ldqwtzskzl4w8yz8oho60z','2026-11-27 03:16:00.319000','local',NULL,'cancel_job','job_rseh6zjt6gwwr4qc1xtub9sfrm','8e0f1499c4bf4077b3ef4d017ab7e09c',202,'done');
CREATE TABLE checkpoints (
	job_id VARCHAR(40) NOT NULL, 
	seq BIGINT NOT NULL, 
	epoch BIGINT NOT NULL, 
	stage VARCHAR(50) NOT NULL, 
	step INTEGER, 
	fraction FLOAT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_checkpoints PRIMARY KEY (job_id, seq), 
	CONSTRAINT fk_checkpoints_job_id FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "checkpoints" VALUES('job_lpzdpiskrsmyxyy33cvoe2gdq6',3,1,'finetune',0,0.5,'d4ce2c527afe674c7a086bd74e256019e3d5dcdb31eeb6eaadef5ada8c4383b9',12,'2026-11-27 03:16:00.415000');
CREATE TABLE datasets (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	format VARCHAR(20) NOT NULL, 
	state VARCHAR(20) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	facts JSON, 
	error JSON, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_datasets PRIMARY KEY (id)
);
INSERT INTO "datasets" VALUES('dst_85on8ijja4bx2r4u0c10m1ydnv','local','dataset','npz','checking',12,'d4ce2c527afe674c7a086bd74e256019e3d5dcdb31eeb6eaadef5ada8c4383b9',NULL,NULL,'2026-11-27 03:15:59.586000');
INSERT INTO "datasets" VALUES('dst_5vhnqlqq0t5ub6hkn2ob05v8h8','local','upload','npz','ready',10,'abababababababababababababababababababababababababababababababab','{"num_rows": 100, "columns": [{"name": "image", "dtype": "uint8", "shape": [3, 8, 8]}, {"name": "label", "dtype": "int64", "shape": []}], "classes": []}',NULL,'2026-11-27 03:15:59.997000');
CREATE TABLE deliveries (
	id VARCHAR(40) NOT NULL, 
	webhook_id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	job_id VARCHAR(40), 
	type VARCHAR(40) NOT NULL, 
	body TEXT NOT NULL, 
	state VARCHAR(20) NOT NULL, 
	num_attempts INTEGER NOT NULL, 
	attempts JSON NOT NULL, 
	due_at DATETIME, 
	lease_until DATETIME, 
	created_at DATETIME NOT NULL, 
	finished_at DATETIME, 
	CONSTRAINT pk_deliveries PRIMARY KEY (id), 
	CONSTRAINT fk_deliveries_webhook_id FOREIGN KEY(webhook_id) REFERENCES webhooks (id) ON DELETE CASCADE
);
INSERT INTO "deliveries" VALUES('msg_knac42j7rijdo8ehar01incoda','whk_e8ds0d8jzbvgkrfl71h9m9o13j','local','job_3va21w4kp0lkpd8c5jh71jw911','job.succeeded','{"type":"job.succeeded","timestamp":"2026-11-27T03:16:00.151+00:00","data":{"job_id":"job_3va21w4kp0lkpd8c5jh71jw911","status":"succeeded","attempt":1,"seq":6,"error_code":null,"links":{"self":"/v1/jobs/job_3va21w4kp0lkpd8c5jh71jw911","events":"/v1/jobs/job_3va21w4kp0lkpd8c5jh71jw911/events","metrics":"/v1/jobs/job_3va21w4kp0lkpd8c5jh71jw911/metrics","artifacts":"/v1/jobs/job_3va21w4kp0lkpd8c5jh71jw911/artifacts"}}}','pending',0,'[]','2026-11-27 03:16:00.153000',NULL,'2026-11-27 03:16:00.153000',NULL);
INSERT INTO "deliveries" VALUES('msg_37u7v0zc2qs7kwcsufqcxdx9me','whk_e8ds0d8jzbvgkrfl71h9m9o13j','local','job_c91qiqiueqvwcjm25hvqguxwgu','job.failed','{"type":"job.failed","timestamp":"2026-11-27T03:16:00.268+00:00","data":{"job_id":"job_c91qiqiueqvwcjm25hvqguxwgu","status":"failed","attempt":1,"seq":6,"error_code":"loss_not_finite","links":{"self":"/v1/jobs/job_c91qiqiueqvwcjm25hvqguxwgu","events":"/v1/jobs/job_c91qiqiueqvwcjm25hvqguxwgu/events","metrics":"/v1/jobs/job_c91qiqiueqvwcjm25hvqguxwgu/metrics","artifacts":"/v1/jobs/job_c91qiqiueqvwcjm25hvqguxwgu/artifacts"}}}','pending',0,'[]','2026-11-27 03:16:00.269000',NULL,'2026-11-27 03:16:00.269000',NULL);
CREATE TABLE dispatchers (
	id VARCHAR(80) NOT NULL, 
	started_at DATETIME NOT NULL, 
	seen_at DATETIME NOT NULL, 
	broker_seen_at DATETIME, 
	CONSTRAINT pk_dispatchers PRIMARY KEY (id)
);
CREATE TABLE events (
	job_id VARCHAR(40) NOT NULL, 
	seq BIGINT NOT NULL, 
	kind VARCHAR(20) NOT NULL, 
	data JSON NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_events PRIMARY KEY (job_id, seq), 
	CONSTRAINT fk_events_job_id FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "events" VALUES('job_2mjdgiidpq5bwq8vp02s7oh2ss',1,'state','{"state": "queued", "attempt": 0}','2026-11-27 03:15:59.431000');
INSERT INTO "events" VALUES('job_2mjdgiidpq5bwq8vp02s7oh2ss',2,'state','{"state": "running", "attempt": 1}','2026-11-27 03:15:59.468000');
INSERT INTO "events" VALUES('job_2mjdgiidpq5bwq8vp02s7oh2ss',3,'state','{"state": "succeeded", "attempt": 1}','2026-11-27 03:15:59.477000');
INSERT INTO "events" VALUES('job_iyxzdqryd44mk78fm7f98vfpa3',1,'state','{"state": "queued", "attempt": 0}','2026-11-27 03:15:59.533000');
INSERT INTO "events" VALUES('job_iyxzdqryd44mk78fm7f98vfpa3',2,'state','{"state": "running", "attempt": 1}','2026-11-27 03:15:59.547000');
INSERT INTO "events" VALUES('job_iyxzdqryd44mk78fm7f98vfpa3',3,'state','{"state": "failed", "attempt": 1, "reason": "not_a_program"}','2026-11-27 03:15:59.554000');
INSERT INTO "events" VALUES('job_9j3fg9v53fgwckw3y4xnb2jy10',1,'state','{"state": "queued", "attempt": 0}','2026-11-27 03:15:59.599000');
INSERT INTO "events" VALUES('job_3va21w4kp0lkpd8c5jh71jw911',1,'state','{"state": "queued", "attempt": 0}','2026-11-27 03:15:59.817000');
INSERT INTO "events" VALUES('job_c91qiqiueqvwcjm25hvqguxwgu',1,'state','{"state": "queued", "attempt": 0}','2026-11-27 03:15:59.861000');
INSERT INTO "events" VALUES('job_rseh6zjt6gwwr4qc1xtub9sfrm',1,'state','{"state": "queued", "attempt": 0}','2026-11-27 03:15:59.886000');
INSERT INTO "events" VALUES('job_lpzdpiskrsmyxyy33cvoe2gdq6',1,'state','{"state": "queued", "attempt": 0}','2026-11-27 03:15:59.932000');
INSERT INTO "events" VALUES('job_4m7p5q60rc799d60v31s6pzmb2',1,'state','{"state": "queued", "attempt": 0}','2026-11-27 03:15:59.975000');
INSERT INTO "events" VALUES('job_ceo8eci416mtejp77vtad4m3du',1,'state','{"state": "queued", "attempt": 0}','2026-11-27 03:16:00.028000');
INSERT INTO "events" VALUES('job_ceo8eci416mtejp77vtad4m3du',2,'state','{"state": "running", "attempt": 1}','2026-11-27 03:16:00.033000');
INSERT INTO "events" VALUES('job_3va21w4kp0lkpd8c5jh71jw911',2,'state','{"state": "running", "attempt": 1}','2026-11-27 03:16:00.041000');
INSERT INTO "events" VALUES('job_3va21w4kp0lkpd8c5jh71jw911',3,'progress','{"stage": "finetune", "step": null, "fraction": 0.1, "eta_seconds": null, "message": "", "metrics": {}}','2026-11-27 03:16:00.051000');
INSERT INTO "events" VALUES('job_3va21w4kp0lkpd8c5jh71jw911',4,'progress','{"stage": "finetune", "step": null, "fraction": 0.5, "eta_seconds": null, "message": "", "metrics": {}}','2026-11-27 03:16:00.056000');
INSERT INTO "events" VALUES('job_3va21w4kp0lkpd8c5jh71jw911',5,'progress','{"stage": "finetune", "step": null, "fraction": 0.9, "eta_seconds": null, "message": "", "metrics": {}}','2026-11-27 03:16:00.059000');
INSERT INTO "events" VALUES('job_3va21w4kp0lkpd8c5jh71jw911',6,'state','{"state": "succeeded", "attempt": 1}','2026-11-27 03:16:00.141000');
INSERT INTO "events" VALUES('job_c91qiqiueqvwcjm25hvqguxwgu',2,'state','{"state": "running", "attempt": 1}','2026-11-27 03:16:00.198000');
INSERT INTO "events" VALUES('job_c91qiqiueqvwcjm25hvqguxwgu',3,'progress','{"stage": "finetune", "step": null, "fraction": 0.1, "eta_seconds": null, "message": "", "metrics": {}}','2026-11-27 03:16:00.206000');
INSERT INTO "events" VALUES('job_c91qiqiueqvwcjm25hvqguxwgu',4,'progress','{"stage": "finetune", "step": null, "fraction": 0.5, "eta_seconds": null, "message": "", "metrics": {}}','2026-11-27 03:16:00.231000');
INSERT INTO "events" VALUES('job_c91qiqiueqvwcjm25hvqguxwgu',5,'progress','{"stage": "finetune", "step": null, "fraction": 0.9, "eta_seconds": null, "message": "", "metrics": {}}','2026-11-27 03:16:00.239000');
INSERT INTO "events" VALUES('job_c91qiqiueqvwcjm25hvqguxwgu',6,'state','{"state": "failed", "attempt": 1, "reason": "loss_not_finite"}','2026-11-27 03:16:00.268000');
INSERT INTO "events" VALUES('job_rseh6zjt6gwwr4qc1xtub9sfrm',2,'state','{"state": "cancelled", "attempt": 0}','2026-11-27 03:16:00.304000');
INSERT INTO "events" VALUES('job_lpzdpiskrsmyxyy33cvoe2gdq6',2,'state','{"state": "running", "attempt": 1}','2026-11-27 03:16:00.342000');
INSERT INTO "events" VALUES('job_lpzdpiskrsmyxyy33cvoe2gdq6',3,'checkpoint','{"stage": "finetune", "step": 0, "fraction": 0.5, "size_bytes": 12}','2026-11-27 03:16:00.389000');
CREATE TABLE idempotency_keys (
	owner VARCHAR(40) NOT NULL, 
	route VARCHAR(100) NOT NULL, 
	"key" VARCHAR(255) NOT NULL, 
	fingerprint VARCHAR(64) NOT NULL, 
	status INTEGER NOT NULL, 
	body TEXT NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_idempotency_keys PRIMARY KEY (owner, route, "key")
);
INSERT INTO "idempotency_keys" VALUES('local','POST /v1/jobs','number-0','ed2481b32d1e67dbeda1debf7cde8ab6a792e3148883530acde157f8ba7d3148',202,'{"id":"job_3va21w4kp0lkpd8c5jh71jw911","model_id":"mdl_588mqd4pqk3rfx7r29gl379mnz","status":"queued","stage":null,"progress":{"fraction":0.0,"eta_seconds":null,"message":""},"attempt":0,"max_attempts":3,"checkpoint":null,"resumed_from":null,"error":null,"verdict":null,"isolation":[],"recipe":{"steps":[{"kind":"prune_magnitude","sparsity":0.5,"scope":"global","schedule":"one_shot","num_iterations":5,"training":null,"skip_layers":[]}],"data":null,"target":{"device":"cpu","runtime":"onnxruntime","num_threads":1,"batch_size":1,"num_runs":100},"outputs":{"formats":null},"seed":0},"parent_id":null,"webhook_id":null,"labels":{"n":"0"},"priority":0,"deadline_seconds":21600,"needs":{"device":"cpu","num_devices":0,"memory_bytes":0,"num_threads":1},"waiting":{"reason":"no_worker","detail":"no worker that takes jobs was seen lately; the job waits until one is","fix":"Start a worker; GET /v1/workers lists those that are there."},"num_jobs_ahead":1,"created_at":"2026-11-27T03:15:59.817000Z","started_at":null,"finished_at":null,"links":{"self":"/v1/jobs/job_3va21w4kp0lkpd8c5jh71jw911","events":"/v1/jobs/job_3va21w4kp0lkpd8c5jh71jw911/events","metrics":"/v1/jobs/job_3va21w4kp0lkpd8c5jh71jw911/metrics","artifacts":"/v1/jobs/job_3va21w4kp0lkpd8c5jh71jw911/artifacts","logs":"/v1/jobs/job_3va21w4kp0lkpd8c5jh71jw911/logs","cancel":"/v1/jobs/job_3va21w4kp0lkpd8c5jh71jw911/cancel","model":"/v1/models/mdl_588mqd4pqk3rfx7r29gl379mnz","distillation":null}}','2026-11-27 03:15:59.813000');
INSERT INTO "idempotency_keys" VALUES('local','POST /v1/jobs','number-1','5527d50b2e014a1113b50d16b613db7198d1d2fb47e7946c2d55a041c3fc6f63',202,'{"id":"job_c91qiqiueqvwcjm25hvqguxwgu","model_id":"mdl_588mqd4pqk3rfx7r29gl379mnz","status":"queued","stage":null,"progress":{"fraction":0.0,"eta_seconds":null,"message":""},"attempt":0,"max_attempts":3,"checkpoint":null,"resumed_from":null,"error":null,"verdict":null,"isolation":[],"recipe":{"steps":[{"kind":"prune_magnitude","sparsity":0.5,"scope":"global","schedule":"one_shot","num_iterations":5,"training":null,"skip_layers":[]}],"data":null,"target":{"device":"cpu","runtime":"onnxruntime","num_threads":1,"batch_size":1,"num_runs":100},"outputs":{"formats":null},"seed":0},"parent_id":null,"webhook_id":null,"labels":{"n":"1"},"priority":0,"deadline_seconds":21600,"needs":{"device":"cpu","num_devices":0,"memory_bytes":0,"num_threads":1},"waiting":{"reason":"no_worker","detail":"no worker that takes jobs was seen lately; the job waits until one is","fix":"Start a worker; GET /v1/workers lists those that are there."},"num_jobs_ahead":2,"created_at":"2026-11-27T03:15:59.861000Z","started_at":null,"finished_at":null,"links":{"self":"/v1/jobs/job_c91qiqiueqvwcjm25hvqguxwgu","events":"/v1/jobs/job_c91qiqiueqvwcjm25hvqguxwgu/events","metrics":"/v1/jobs/job_c91qiqiueqvwcjm25hvqguxwgu/metrics","artifacts":"/v1/jobs/job_c91qiqiueqvwcjm25hvqguxwgu/artifacts","logs":"/v1/jobs/job_c91qiqiueqvwcjm25hvqguxwgu/logs","cancel":"/v1/jobs/job_c91qiqiueqvwcjm25hvqguxwgu/cancel","model":"/v1/models/mdl_588mqd4pqk3rfx7r29gl379mnz","distillation":null}}','2026-11-27 03:15:59.858000');
INSERT INTO "idempotency_keys" VALUES('local','POST /v1/jobs','number-2','f933b9e18d392fe7ca71306b4065f7450968bf4554a13db3b5b4bc3fb1f61b1d',202,'{"id":"job_rseh6zjt6gwwr4qc1xtub9sfrm","model_id":"mdl_588mqd4pqk3rfx7r29gl379mnz","status":"queued","stage":null,"progress":{"fraction":0.0,"eta_seconds":null,"message":""},"attempt":0,"max_attempts":3,"checkpoint":null,"resumed_from":null,"error":null,"verdict":null,"isolation":[],"recipe":{"steps":[{"kind":"prune_magnitude","sparsity":0.5,"scope":"global","schedule":"one_shot","num_iterations":5,"training":null,"skip_layers":[]}],"data":null,"target":{"device":"cpu","runtime":"onnxruntime","num_threads":1,"batch_size":1,"num_runs":100},"outputs":{"formats":null},"seed":0},"parent_id":null,"webhook_id":null,"labels":{"n":"2"},"priority":0,"deadline_seconds":21600,"needs":{"device":"cpu","num_devices":0,"memory_bytes":0,"num_threads":1},"waiting":{"reason":"no_worker","detail":"no worker that takes jobs was seen lately; the job waits until one is","fix":"Start a worker; GET /v1/workers lists those that are there."},"num_jobs_ahead":3,"created_at":"2026-11-27T03:15:59.885000Z","started_at":null,"finished_at":null,"links":{"self":"/v1/jobs/job_rseh6zjt6gwwr4qc1xtub9sfrm","events":"/v1/jobs/job_rseh6zjt6gwwr4qc1xtub9sfrm/events","metrics":"/v1/jobs/job_rseh6zjt6gwwr4qc1xtub9sfrm/metrics","artifacts":"/v1/jobs/job_rseh6zjt6gwwr4qc1xtub9sfrm/artifacts","logs":"/v1/jobs/job_rseh6zjt6gwwr4qc1xtub9sfrm/logs","cancel":"/v1/jobs/job_rseh6zjt6gwwr4qc1xtub9sfrm/cancel","model":"/v1/models/mdl_588mqd4pqk3rfx7r29gl379mnz","distillation":null}}','2026-11-27 03:15:59.882000');
INSERT INTO "idempotency_keys" VALUES('local','POST /v1/jobs','number-3','38768efd2694b361ecf124556b2f0ae9848eb3b410de9e1a99c8959e042151d7',202,'{"id":"job_lpzdpiskrsmyxyy33cvoe2gdq6","model_id":"mdl_588mqd4pqk3rfx7r29gl379mnz","status":"queued","stage":null,"progress":{"fraction":0.0,"eta_seconds":null,"message":""},"attempt":0,"max_attempts":3,"checkpoint":null,"resumed_from":null,"error":null,"verdict":null,"isolation":[],"recipe":{"steps":[{"kind":"prune_magnitude","sparsity":0.5,"scope":"global","schedule":"one_shot","num_iterations":5,"training":null,"skip_layers":[]}],"data":null,"target":{"device":"cpu","runtime":"onnxruntime","num_threads":1,"batch_size":1,"num_runs":100},"outputs":{"formats":null},"seed":0},"parent_id":null,"webhook_id":null,"labels":{"n":"3"},"priority":0,"deadline_seconds":21600,"needs":{"device":"cpu","num_devices":0,"memory_bytes":0,"num_threads":1},"waiting":{"reason":"no_worker","detail":"no worker that takes jobs was seen lately; the job waits until one is","fix":"Start a worker; GET /v1/workers lists those that are there."},"num_jobs_ahead":4,"created_at":"2026-11-27T03:15:59.931000Z","started_at":null,"finished_at":null,"links":{"self":"/v1/jobs/job_lpzdpiskrsmyxyy33cvoe2gdq6","events":"/v1/jobs/job_lpzdpiskrsmyxyy33cvoe2gdq6/events","metrics":"/v1/jobs/job_lpzdpiskrsmyxyy33cvoe2gdq6/metrics","artifacts":"/v1/jobs/job_lpzdpiskrsmyxyy33cvoe2gdq6/artifacts","logs":"/v1/jobs/job_lpzdpiskrsmyxyy33cvoe2gdq6/logs","cancel":"/v1/jobs/job_lpzdpiskrsmyxyy33cvoe2gdq6/cancel","model":"/v1/models/mdl_588mqd4pqk3rfx7r29gl379mnz","distillation":null}}','2026-11-27 03:15:59.928000');
INSERT INTO "idempotency_keys" VALUES('local','POST /v1/jobs','number-4','4fce1a37e37e1e40ee8d1d51f7d8671b165d2a428c868f7552a395f16166af2a',202,'{"id":"job_4m7p5q60rc799d60v31s6pzmb2","model_id":"mdl_588mqd4pqk3rfx7r29gl379mnz","status":"queued","stage":null,"progress":{"fraction":0.0,"eta_seconds":null,"message":""},"attempt":0,"max_attempts":3,"checkpoint":null,"resumed_from":null,"error":null,"verdict":null,"isolation":[],"recipe":{"steps":[{"kind":"prune_magnitude","sparsity":0.5,"scope":"global","schedule":"one_shot","num_iterations":5,"training":null,"skip_layers":[]}],"data":null,"target":{"device":"cpu","runtime":"onnxruntime","num_threads":1,"batch_size":1,"num_runs":100},"outputs":{"formats":null},"seed":0},"parent_id":null,"webhook_id":null,"labels":{"n":"4"},"priority":0,"deadline_seconds":21600,"needs":{"device":"cpu","num_devices":0,"memory_bytes":0,"num_threads":1},"waiting":{"reason":"no_worker","detail":"no worker that takes jobs was seen lately; the job waits until one is","fix":"Start a worker; GET /v1/workers lists those that are there."},"num_jobs_ahead":5,"created_at":"2026-11-27T03:15:59.974000Z","started_at":null,"finished_at":null,"links":{"self":"/v1/jobs/job_4m7p5q60rc799d60v31s6pzmb2","events":"/v1/jobs/job_4m7p5q60rc799d60v31s6pzmb2/events","metrics":"/v1/jobs/job_4m7p5q60rc799d60v31s6pzmb2/metrics","artifacts":"/v1/jobs/job_4m7p5q60rc799d60v31s6pzmb2/artifacts","logs":"/v1/jobs/job_4m7p5q60rc799d60v31s6pzmb2/logs","cancel":"/v1/jobs/job_4m7p5q60rc799d60v31s6pzmb2/cancel","model":"/v1/models/mdl_588mqd4pqk3rfx7r29gl379mnz","distillation":null}}','2026-11-27 03:15:59.971000');
CREATE TABLE "jobs" (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	action VARCHAR(20) NOT NULL, 
	model_id VARCHAR(40), 
	dataset_id VARCHAR(40), 
	evaluation_dataset_id VARCHAR(40), 
	recipe JSON, 
	labels JSON NOT NULL, 
	priority INTEGER NOT NULL, 
	deadline_seconds INTEGER, 
	state VARCHAR(20) NOT NULL, 
	attempt INTEGER NOT NULL, 
	max_attempts INTEGER NOT NULL, 
	epoch BIGINT NOT NULL, 
	worker_id VARCHAR(80), 
	lease_until DATETIME, 
	published_at DATETIME, 
	stage VARCHAR(50), 
	progress JSON NOT NULL, 
	error JSON, 
	metrics JSON, 
	verdict JSON, 
	isolation JSON NOT NULL, 
	last_seq BIGINT NOT NULL, 
	created_at DATETIME NOT NULL, 
	started_at DATETIME, 
	finished_at DATETIME, 
	resumed_from JSON, 
	needs_device VARCHAR(10) DEFAULT 'cpu' NOT NULL, 
	needs_num_devices INTEGER DEFAULT '0' NOT NULL, 
	needs_memory_bytes BIGINT DEFAULT '0' NOT NULL, 
	needs_num_threads INTEGER DEFAULT '1' NOT NULL, 
	claimed_at DATETIME, 
	waiting_reason VARCHAR(40), 
	parent_id VARCHAR(40), 
	part VARCHAR(60), 
	webhook_id VARCHAR(40), 
	CONSTRAINT pk_jobs PRIMARY KEY (id), 
	CONSTRAINT fk_jobs_model_id FOREIGN KEY(model_id) REFERENCES models (id), 
	CONSTRAINT uq_jobs_parent_id UNIQUE (parent_id, part), 
	CONSTRAINT fk_jobs_dataset_id FOREIGN KEY(dataset_id) REFERENCES datasets (id), 
	CONSTRAINT fk_jobs_parent_id FOREIGN KEY(parent_id) REFERENCES jobs (id) ON DELETE CASCADE, 
	CONSTRAINT fk_jobs_evaluation_dataset_id FOREIGN KEY(evaluation_dataset_id) REFERENCES datasets (id), 
	CONSTRAINT fk_jobs_webhook_id FOREIGN KEY(webhook_id) REFERENCES webhooks (id) ON DELETE SET NULL
);
INSERT INTO "jobs" VALUES('job_2mjdgiidpq5bwq8vp02s7oh2ss','local','check_model','mdl_588mqd4pqk3rfx7r29gl379mnz',NULL,NULL,NULL,'{}',100,600,'succeeded',1,3,1,'hands',NULL,'2026-11-27 03:15:59.408000','claimed','{"fraction": 1.0, "eta_seconds": 0.0, "message": ""}',NULL,NULL,NULL,'[]',3,'2026-11-27 03:15:59.408000','2026-11-27 03:15:59.467000','2026-11-27 03:15:59.476000',NULL,'cpu',0,0,1,'2026-11-27 03:15:59.467000',NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job_iyxzdqryd44mk78fm7f98vfpa3','local','check_model','mdl_xtv854px5wpni711eic3gxwjdm',NULL,NULL,NULL,'{}',100,600,'failed',1,3,1,'hands',NULL,'2026-11-27 03:15:59.532000','claimed','{"fraction": 0.0, "eta_seconds": null, "message": ""}','{"code": "not_a_program", "detail": "the archive has no model.json", "fix": "Export it again.", "retryable": false}',NULL,NULL,'[]',3,'2026-11-27 03:15:59.532000','2026-11-27 03:15:59.547000','2026-11-27 03:15:59.553000',NULL,'cpu',0,0,1,'2026-11-27 03:15:59.547000',NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job_9j3fg9v53fgwckw3y4xnb2jy10','local','check_dataset',NULL,'dst_85on8ijja4bx2r4u0c10m1ydnv',NULL,NULL,'{}',100,600,'queued',0,3,0,NULL,NULL,'2026-11-27 03:15:59.589000',NULL,'{"fraction": 0.0, "eta_seconds": null, "message": ""}',NULL,NULL,NULL,'[]',1,'2026-11-27 03:15:59.589000',NULL,NULL,NULL,'cpu',0,0,1,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job_3va21w4kp0lkpd8c5jh71jw911','local','optimize','mdl_588mqd4pqk3rfx7r29gl379mnz',NULL,NULL,'{"steps": [{"kind": "prune_magnitude", "sparsity": 0.5, "scope": "global", "schedule": "one_shot", "num_iterations": 5, "training": null, "skip_layers": []}], "data": null, "target": {"device": "cpu", "runtime": "onnxruntime", "num_threads": 1, "batch_size": 1, "num_runs": 100}, "outputs": {"formats": null}, "seed": 0}','{"n": "0"}',0,21600,'succeeded',1,3,1,'hands',NULL,'2026-11-27 03:15:59.817000','finetune','{"fraction": 1.0, "eta_seconds": 0.0, "message": ""}',NULL,'{"baseline": {"quality": {"metric": "accuracy", "value": 0.95, "higher_is_better": true, "num_examples": 100, "standard_error": 0.02}, "latency": {"batch_size": 1, "num_threads": 1, "num_runs": 10, "p50_ms": 2.0, "p90_ms": 2.5, "p99_ms": 3.0, "mean_ms": 2.1}, "throughput_per_second": 500.0, "peak_memory_bytes": 1000000, "peak_device_memory_bytes": null, "file_bytes": 4000, "packed_bytes": null, "parameters": 1000, "nonzero_parameters": 1000, "macs": 5000, "uncounted_operators": []}, "result": {"quality": {"metric": "accuracy", "value": 0.95, "higher_is_better": true, "num_examples": 100, "standard_error": 0.02}, "latency": {"batch_size": 1, "num_threads": 1, "num_runs": 10, "p50_ms": 2.0, "p90_ms": 2.5, "p99_ms": 3.0, "mean_ms": 2.1}, "throughput_per_second": 500.0, "peak_memory_bytes": 1000000, "peak_device_memory_bytes": null, "file_bytes": 1000, "packed_bytes": null, "parameters": 400, "nonzero_parameters": 300, "macs": 5000, "uncounted_operators": []}, "comparison": {"latency_ratio": {"value": 0.5, "low": 0.45, "high": 0.56}, "file_ratio": 0.25, "packed_ratio": null, "parameters_ratio": 0.4, "macs_ratio": 0.5, "peak_memory_ratio": 1.0, "peak_device_memory_ratio": null, "quality_change": 0.0, "equivalence": [{"output": "output", "cosine": 0.999, "snr_db": 30.5, "max_abs_error": 0.1, "num_examples": 100}]}, "steps": [], "layers": [], "sensitivity": [], "verdict": {"outcome": "better", "summary": "half the time", "better": ["file: 4000 -> 1000 bytes"], "worse": [], "within_noise": [], "warnings": []}, "environment": {"processor": "p", "num_cores": 2, "runtime": "onnxruntime", "num_threads": 1, "versions": {"torch": "2.13.0"}, "isolation": [], "device": null, "target_device": "cpu"}, "distillation": null}','{"outcome": "better", "summary": "half the time", "better": ["file: 4000 -> 1000 bytes"], "worse": [], "within_noise": [], "warnings": []}','["bubblewrap"]',6,'2026-11-27 03:15:59.817000','2026-11-27 03:16:00.040000','2026-11-27 03:16:00.141000',NULL,'cpu',0,0,1,'2026-11-27 03:16:00.040000',NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job_c91qiqiueqvwcjm25hvqguxwgu','local','optimize','mdl_588mqd4pqk3rfx7r29gl379mnz',NULL,NULL,'{"steps": [{"kind": "prune_magnitude", "sparsity": 0.5, "scope": "global", "schedule": "one_shot", "num_iterations": 5, "training": null, "skip_layers": []}], "data": null, "target": {"device": "cpu", "runtime": "onnxruntime", "num_threads": 1, "batch_size": 1, "num_runs": 100}, "outputs": {"formats": null}, "seed": 0}','{"n": "1"}',0,21600,'failed',1,3,1,'hands',NULL,'2026-11-27 03:15:59.861000','finetune','{"stage": "finetune", "step": null, "fraction": 0.9, "eta_seconds": null, "message": "", "metrics": {}}','{"code": "loss_not_finite", "detail": "loss is nan", "fix": "Lower it.", "retryable": false}',NULL,NULL,'[]',6,'2026-11-27 03:15:59.861000','2026-11-27 03:16:00.197000','2026-11-27 03:16:00.267000',NULL,'cpu',0,0,1,'2026-11-27 03:16:00.197000',NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job_rseh6zjt6gwwr4qc1xtub9sfrm','local','optimize','mdl_588mqd4pqk3rfx7r29gl379mnz',NULL,NULL,'{"steps": [{"kind": "prune_magnitude", "sparsity": 0.5, "scope": "global", "schedule": "one_shot", "num_iterations": 5, "training": null, "skip_layers": []}], "data": null, "target": {"device": "cpu", "runtime": "onnxruntime", "num_threads": 1, "batch_size": 1, "num_runs": 100}, "outputs": {"formats": null}, "seed": 0}','{"n": "2"}',0,21600,'cancelled',0,3,0,NULL,NULL,'2026-11-27 03:15:59.885000',NULL,'{"fraction": 0.0, "eta_seconds": null, "message": ""}',NULL,NULL,NULL,'[]',2,'2026-11-27 03:15:59.885000',NULL,'2026-11-27 03:16:00.303000',NULL,'cpu',0,0,1,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job_lpzdpiskrsmyxyy33cvoe2gdq6','local','optimize','mdl_588mqd4pqk3rfx7r29gl379mnz',NULL,NULL,'{"steps": [{"kind": "prune_magnitude", "sparsity": 0.5, "scope": "global", "schedule": "one_shot", "num_iterations": 5, "training": null, "skip_layers": []}], "data": null, "target": {"device": "cpu", "runtime": "onnxruntime", "num_threads": 1, "batch_size": 1, "num_runs": 100}, "outputs": {"formats": null}, "seed": 0}','{"n": "3"}',0,21600,'running',1,3,1,'w1','2026-11-27 03:16:01.341000','2026-11-27 03:15:59.931000','claimed','{"fraction": 0.0, "eta_seconds": null, "message": ""}',NULL,NULL,NULL,'[]',3,'2026-11-27 03:15:59.931000','2026-11-27 03:16:00.341000',NULL,NULL,'cpu',0,0,1,'2026-11-27 03:16:00.341000',NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job_4m7p5q60rc799d60v31s6pzmb2','local','optimize','mdl_588mqd4pqk3rfx7r29gl379mnz',NULL,NULL,'{"steps": [{"kind": "prune_magnitude", "sparsity": 0.5, "scope": "global", "schedule": "one_shot", "num_iterations": 5, "training": null, "skip_layers": []}], "data": null, "target": {"device": "cpu", "runtime": "onnxruntime", "num_threads": 1, "batch_size": 1, "num_runs": 100}, "outputs": {"formats": null}, "seed": 0}','{"n": "4"}',0,21600,'queued',0,3,0,NULL,NULL,'2026-11-27 03:15:59.974000',NULL,'{"fraction": 0.0, "eta_seconds": null, "message": ""}',NULL,NULL,NULL,'[]',1,'2026-11-27 03:15:59.974000',NULL,NULL,NULL,'cpu',0,0,1,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job_ceo8eci416mtejp77vtad4m3du','local','distill','mdl_5r1ngdtnmftrfbyjguqbg0wpph','dst_5vhnqlqq0t5ub6hkn2ob05v8h8',NULL,'{"teacher_training": {"epochs": 2, "max_steps": null, "batch_size": 64, "accumulate": 1, "optimizer": "adamw", "learning_rate": 0.001, "momentum": 0.9, "weight_decay": 0.0001, "schedule": "cosine", "warmup_fraction": 0.05, "gradient_clip_norm": 1.0, "label_smoothing": 0.0, "precision": "fp32", "augmentations": [], "keep_best": true, "patience": null, "parallel": null, "kind": "finetune"}, "student": {"kind": "derive_student", "width": 0.5, "depth": 1.0, "criterion": "group_norm", "round_to": 4}, "training": {"epochs": 9, "max_steps": null, "batch_size": 64, "accumulate": 1, "optimizer": "adamw", "learning_rate": 0.001, "momentum": 0.9, "weight_decay": 0.0001, "schedule": "cosine", "warmup_fraction": 0.05, "gradient_clip_norm": 1.0, "label_smoothing": 0.0, "precision": "fp32", "augmentations": [], "keep_best": true, "patience": null, "parallel": null, "kind": "distill", "teacher_model_id": null, "temperature": 4.0, "soft_weight": 0.9, "label_weight": 0.1, "hidden_weight": 0.0, "attention_weight": 0.0, "pairs": []}, "tuning": null, "data": {"dataset_id": "dst_5vhnqlqq0t5ub6hkn2ob05v8h8", "evaluation_dataset_id": null, "inputs": {"x": {"column": "image", "layout": "as_is", "scale": 0.5, "mean": [], "std": [], "resize": null, "tokens": null, "max_tokens": null}}, "label_column": "label", "task": "classification", "output": null, "evaluation_fraction": 0.2, "split_column": null, "training_split": "train", "evaluation_split": "test", "max_evaluation_examples": 5000}, "target": {"device": "cpu", "runtime": "onnxruntime", "num_threads": 1, "batch_size": 1, "num_runs": 100}, "outputs": {"formats": null}, "seed": 0}','{}',0,21600,'running',1,1,0,NULL,NULL,NULL,NULL,'{"fraction": 0.0, "eta_seconds": null, "message": ""}',NULL,NULL,NULL,'[]',2,'2026-11-27 03:16:00.027000','2026-11-27 03:16:00.030000',NULL,NULL,'cpu',0,0,1,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE logs (
	job_id VARCHAR(40) NOT NULL, 
	attempt INTEGER NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_logs PRIMARY KEY (job_id, attempt), 
	CONSTRAINT fk_logs_job_id FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "logs" VALUES('job_3va21w4kp0lkpd8c5jh71jw911',1,8,'755f78019e2c8d121a7cad3ab1e149f3b5d4f5367d6438cea819781b4bd29495','2026-11-27 03:16:00.187000');
INSERT INTO "logs" VALUES('job_c91qiqiueqvwcjm25hvqguxwgu',1,8,'755f78019e2c8d121a7cad3ab1e149f3b5d4f5367d6438cea819781b4bd29495','2026-11-27 03:16:00.269000');
CREATE TABLE models (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	format VARCHAR(20) NOT NULL, 
	state VARCHAR(20) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	facts JSON, 
	error JSON, 
	created_at DATETIME NOT NULL, architecture VARCHAR(300), made_by VARCHAR(40), 
	CONSTRAINT pk_models PRIMARY KEY (id)
);
INSERT INTO "models" VALUES('mdl_5eegmulcr1g0api58sgl1jm7t5','local','upload','pt2','ready',10,'abababababababababababababababababababababababababababababababab','{"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 8, 8]}], "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}], "dynamic_batch": true, "batch_size": null, "exported_in": "eval", "parameters": 100, "buffers": 0, "parameter_bytes": 400, "macs": 1000, "uncounted_operators": [], "layers": [{"name": "conv", "type": "Conv2d", "shape": [8, 3, 3, 3], "parameters": 216, "macs": 1}, {"name": "head", "type": "Linear", "shape": [10, 8], "parameters": 80, "macs": 1}], "tied": [], "tokenizer": false, "capabilities": [{"kind": "prune_structured", "applicable": true, "layers": ["conv"], "missing": null}, {"kind": "prune_magnitude", "applicable": true, "layers": ["conv", "head"], "missing": null}], "warnings": []}',NULL,'2026-11-27 03:15:59.191000',NULL,NULL);
INSERT INTO "models" VALUES('mdl_588mqd4pqk3rfx7r29gl379mnz','local','uploaded','pt2','ready',12,'d4ce2c527afe674c7a086bd74e256019e3d5dcdb31eeb6eaadef5ada8c4383b9','{"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3]}], "outputs": [{"name": "output", "dtype": "float32", "shape": ["batch", 2]}], "dynamic_batch": true, "batch_size": null, "exported_in": "eval", "parameters": 8, "buffers": 0, "parameter_bytes": 32, "macs": 6, "uncounted_operators": [], "layers": [], "tied": [], "tokenizer": false, "capabilities": [], "warnings": []}',NULL,'2026-11-27 03:15:59.353000',NULL,NULL);
INSERT INTO "models" VALUES('mdl_xtv854px5wpni711eic3gxwjdm','local','model','pt2','rejected',8,'f62c7d17e241fe5c5c0c64d2e32ab6e3bd10547a9c02977cc126acc0fe6e6554',NULL,'{"code": "not_a_program", "detail": "the archive has no model.json", "fix": "Export it again.", "retryable": false}','2026-11-27 03:15:59.521000',NULL,NULL);
INSERT INTO "models" VALUES('mdl_5r1ngdtnmftrfbyjguqbg0wpph','local','upload','pt2','ready',10,'abababababababababababababababababababababababababababababababab','{"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 8, 8]}], "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}], "dynamic_batch": true, "batch_size": null, "exported_in": "eval", "parameters": 100, "buffers": 0, "parameter_bytes": 400, "macs": 1000, "uncounted_operators": [], "layers": [{"name": "conv", "type": "Conv2d", "shape": [8, 3, 3, 3], "parameters": 216, "macs": 1}, {"name": "head", "type": "Linear", "shape": [10, 8], "parameters": 80, "macs": 1}], "tied": [], "tokenizer": false, "capabilities": [{"kind": "prune_structured", "applicable": true, "layers": ["conv"], "missing": null}, {"kind": "prune_magnitude", "applicable": true, "layers": ["conv", "head"], "missing": null}], "warnings": []}',NULL,'2026-11-27 03:15:59.993000',NULL,NULL);
CREATE TABLE outbox (
	id INTEGER NOT NULL, 
	job_id VARCHAR(40) NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_outbox PRIMARY KEY (id), 
	CONSTRAINT fk_outbox_job_id FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "outbox" VALUES(1,'job_2mjdgiidpq5bwq8vp02s7oh2ss','2026-11-27 03:15:59.432000');
INSERT INTO "outbox" VALUES(2,'job_iyxzdqryd44mk78fm7f98vfpa3','2026-11-27 03:15:59.533000');
INSERT INTO "outbox" VALUES(3,'job_9j3fg9v53fgwckw3y4xnb2jy10','2026-11-27 03:15:59.600000');
INSERT INTO "outbox" VALUES(4,'job_3va21w4kp0lkpd8c5jh71jw911','2026-11-27 03:15:59.818000');
INSERT INTO "outbox" VALUES(5,'job_c91qiqiueqvwcjm25hvqguxwgu','2026-11-27 03:15:59.862000');
INSERT INTO "outbox" VALUES(6,'job_rseh6zjt6gwwr4qc1xtub9sfrm','2026-11-27 03:15:59.886000');
INSERT INTO "outbox" VALUES(7,'job_lpzdpiskrsmyxyy33cvoe2gdq6','2026-11-27 03:15:59.932000');
INSERT INTO "outbox" VALUES(8,'job_4m7p5q60rc799d60v31s6pzmb2','2026-11-27 03:15:59.975000');
CREATE TABLE owners (
	name VARCHAR(40) NOT NULL, 
	stored_bytes BIGINT, 
	running_jobs BIGINT, 
	queued_jobs BIGINT, 
	requests_per_minute BIGINT, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_owners PRIMARY KEY (name)
);
INSERT INTO "owners" VALUES('local',NULL,NULL,100,NULL,'2026-11-27 03:15:59.379000');
INSERT INTO "owners" VALUES('ann',NULL,NULL,NULL,NULL,'2026-11-27 03:15:59.730000');
CREATE TABLE request_windows (
	owner VARCHAR(40) NOT NULL, 
	window BIGINT NOT NULL, 
	taken BIGINT NOT NULL, 
	CONSTRAINT pk_request_windows PRIMARY KEY (owner)
);
INSERT INTO "request_windows" VALUES('local',29929156,300);
CREATE TABLE upload_parts (
	upload_id VARCHAR(40) NOT NULL, 
	start_bytes BIGINT NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	CONSTRAINT pk_upload_parts PRIMARY KEY (upload_id, start_bytes), 
	CONSTRAINT fk_upload_parts_upload_id FOREIGN KEY(upload_id) REFERENCES uploads (id) ON DELETE CASCADE
);
INSERT INTO "upload_parts" VALUES('upl_ktk7uy3f9crf4c7w0iw8egtj1x',0,12,'d4ce2c527afe674c7a086bd74e256019e3d5dcdb31eeb6eaadef5ada8c4383b9');
CREATE TABLE uploads (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	offset_bytes BIGINT NOT NULL, 
	description TEXT, 
	made VARCHAR(40), 
	created_at DATETIME NOT NULL, 
	expires_at DATETIME NOT NULL, 
	CONSTRAINT pk_uploads PRIMARY KEY (id)
);
INSERT INTO "uploads" VALUES('upl_ktk7uy3f9crf4c7w0iw8egtj1x','local',20,12,NULL,NULL,'2026-11-27 03:15:59.743000','2026-11-28 03:15:59.780000');
CREATE TABLE webhooks (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	url VARCHAR(2048) NOT NULL, 
	description VARCHAR(200) NOT NULL, 
	events JSON NOT NULL, 
	jobs VARCHAR(10) NOT NULL, 
	secret VARCHAR(100) NOT NULL, 
	old_secret VARCHAR(100), 
	old_secret_until DATETIME, 
	disabled_reason VARCHAR(40), 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_webhooks PRIMARY KEY (id)
);
INSERT INTO "webhooks" VALUES('whk_e8ds0d8jzbvgkrfl71h9m9o13j','local','https://8.8.8.8/hook','','["job.succeeded", "job.failed"]','all','whsec_SD5Iu2+9c/DLFRQAWY+JkWUesBgGe2jEYKzP3EhAxQk=',NULL,NULL,NULL,'2026-11-27 03:15:59.670000');
CREATE TABLE workers (
	id VARCHAR(80) NOT NULL, 
	host VARCHAR(255) NOT NULL, 
	queue VARCHAR(20) NOT NULL, 
	facts JSON NOT NULL, 
	started_at DATETIME NOT NULL, 
	seen_at DATETIME NOT NULL, 
	CONSTRAINT pk_workers PRIMARY KEY (id)
);
CREATE INDEX ix_datasets_created ON datasets (created_at, id);
CREATE INDEX ix_datasets_owner ON datasets (owner);
CREATE INDEX ix_models_created ON models (created_at, id);
CREATE INDEX ix_models_owner ON models (owner);
CREATE INDEX ix_artifacts_job_id ON artifacts (job_id);
CREATE INDEX ix_artifacts_owner ON artifacts (owner);
CREATE INDEX ix_models_made_by ON models (made_by);
CREATE INDEX ix_models_sha256 ON models (sha256);
CREATE INDEX ix_datasets_sha256 ON datasets (sha256);
CREATE INDEX ix_artifacts_sha256 ON artifacts (sha256);
CREATE INDEX ix_logs_sha256 ON logs (sha256);
CREATE INDEX ix_webhooks_owner_created ON webhooks (owner, created_at, id);
CREATE INDEX ix_deliveries_state_due ON deliveries (state, due_at);
CREATE INDEX ix_deliveries_webhook_created ON deliveries (webhook_id, created_at, id);
CREATE INDEX ix_jobs_owner_claimed ON jobs (owner, claimed_at);
CREATE INDEX ix_jobs_owner ON jobs (owner);
CREATE INDEX ix_jobs_waiting ON jobs (state, needs_device, priority, owner, created_at, id, needs_num_devices, needs_memory_bytes, needs_num_threads);
CREATE INDEX ix_jobs_state_lease ON jobs (state, lease_until);
CREATE INDEX ix_jobs_dataset_id ON jobs (dataset_id);
CREATE INDEX ix_jobs_state_published ON jobs (state, published_at);
CREATE INDEX ix_jobs_created ON jobs (created_at, id);
CREATE INDEX ix_jobs_model_id ON jobs (model_id);
CREATE INDEX ix_uploads_expires_at ON uploads (expires_at);
CREATE INDEX ix_uploads_owner ON uploads (owner);
CREATE INDEX ix_api_keys_owner ON api_keys (owner);
CREATE INDEX ix_api_keys_created ON api_keys (created_at, id);
CREATE INDEX ix_audit_created ON audit (created_at, id);
CREATE INDEX ix_audit_owner ON audit (owner);
COMMIT;