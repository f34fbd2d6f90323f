--
-- PostgreSQL database dump
--

\restrict 9VKv6M6iTb564FQbKdSiQTVmj5uBCLgx4PJ6n59FS100R99UJiQNprmPDIYefMh

-- Dumped from database version 16.14
-- Dumped by pg_dump version 16.14

SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;

SET default_tablespace = '';

SET default_table_access_method = heap;

--
-- Name: alembic_version; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);


--
-- Name: api_keys; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.api_keys (
    id character varying(40) NOT NULL,
    owner character varying(40) NOT NULL,
    name character varying(200) NOT NULL,
    scopes json NOT NULL,
    secret_sha256 character varying(64) NOT NULL,
    created_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone,
    revoked_at timestamp with time zone,
    last_used_at timestamp with time zone,
    replaced_by character varying(40)
);


--
-- Name: artifacts; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.artifacts (
    id character varying(40) NOT NULL,
    job_id character varying(40) NOT NULL,
    owner character varying(40) NOT NULL,
    name character varying(100) NOT NULL,
    media_type character varying(100) NOT NULL,
    size_bytes bigint NOT NULL,
    sha256 character varying(64) NOT NULL,
    epoch bigint NOT NULL,
    created_at timestamp with time zone NOT NULL
);


--
-- Name: audit; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.audit (
    id character varying(40) NOT NULL,
    created_at timestamp with time zone NOT NULL,
    owner character varying(40) NOT NULL,
    key_id character varying(40),
    action character varying(60) NOT NULL,
    target character varying(200),
    request_id character varying(64),
    status integer,
    outcome character varying(10) NOT NULL
);


--
-- Name: checkpoints; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.checkpoints (
    job_id character varying(40) NOT NULL,
    seq bigint NOT NULL,
    epoch bigint NOT NULL,
    stage character varying(50) NOT NULL,
    step integer,
    fraction double precision NOT NULL,
    sha256 character varying(64) NOT NULL,
    size_bytes bigint NOT NULL,
    created_at timestamp with time zone NOT NULL
);


--
-- Name: datasets; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.datasets (
    id character varying(40) NOT NULL,
    owner character varying(40) NOT NULL,
    name character varying(200) NOT NULL,
    format character varying(20) NOT NULL,
    state character varying(20) NOT NULL,
    size_bytes bigint NOT NULL,
    sha256 character varying(64) NOT NULL,
    facts json,
    error json,
    created_at timestamp with time zone NOT NULL
);


--
-- Name: deliveries; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.deliveries (
    id character varying(40) NOT NULL,
    webhook_id character varying(40) NOT NULL,
    owner character varying(40) NOT NULL,
    job_id character varying(40),
    type character varying(40) NOT NULL,
    body text NOT NULL,
    state character varying(20) NOT NULL,
    num_attempts integer NOT NULL,
    attempts json NOT NULL,
    due_at timestamp with time zone,
    lease_until timestamp with time zone,
    created_at timestamp with time zone NOT NULL,
    finished_at timestamp with time zone
);


--
-- Name: dispatchers; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.dispatchers (
    id character varying(80) NOT NULL,
    started_at timestamp with time zone NOT NULL,
    seen_at timestamp with time zone NOT NULL,
    broker_seen_at timestamp with time zone
);


--
-- Name: events; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.events (
    job_id character varying(40) NOT NULL,
    seq bigint NOT NULL,
    kind character varying(20) NOT NULL,
    data json NOT NULL,
    created_at timestamp with time zone NOT NULL
);


--
-- Name: idempotency_keys; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.idempotency_keys (
    owner character varying(40) NOT NULL,
    route character varying(100) NOT NULL,
    key character varying(255) NOT NULL,
    fingerprint character varying(64) NOT NULL,
    status integer NOT NULL,
    body text NOT NULL,
    created_at timestamp with time zone NOT NULL
);


--
-- Name: jobs; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.jobs (
    id character varying(40) NOT NULL,
    owner character varying(40) NOT NULL,
    action character varying(20) NOT NULL,
    model_id character varying(40),
    dataset_id character varying(40),
    evaluation_dataset_id character varying(40),
    recipe json,
    labels json NOT NULL,
    priority integer NOT NULL,
    deadline_seconds integer,
    state character varying(20) NOT NULL,
    attempt integer NOT NULL,
    max_attempts integer NOT NULL,
    epoch bigint NOT NULL,
    worker_id character varying(80),
    lease_until timestamp with time zone,
    published_at timestamp with time zone,
    stage character varying(50),
    progress json NOT NULL,
    error json,
    metrics json,
    verdict json,
    isolation json NOT NULL,
    last_seq bigint NOT NULL,
    created_at timestamp with time zone NOT NULL,
    started_at timestamp with time zone,
    finished_at timestamp with time zone,
    resumed_from json,
    needs_device character varying(10) DEFAULT 'cpu'::character varying NOT NULL,
    needs_num_devices integer DEFAULT 0 NOT NULL,
    needs_memory_bytes bigint DEFAULT '0'::bigint NOT NULL,
    needs_num_threads integer DEFAULT 1 NOT NULL,
    claimed_at timestamp with time zone,
    waiting_reason character varying(40),
    parent_id character varying(40),
    part character varying(60),
    webhook_id character varying(40)
);


--
-- Name: logs; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.logs (
    job_id character varying(40) NOT NULL,
    attempt integer NOT NULL,
    size_bytes bigint NOT NULL,
    sha256 character varying(64) NOT NULL,
    created_at timestamp with time zone NOT NULL
);


--
-- Name: models; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.models (
    id character varying(40) NOT NULL,
    owner character varying(40) NOT NULL,
    name character varying(200) NOT NULL,
    format character varying(20) NOT NULL,
    state character varying(20) NOT NULL,
    size_bytes bigint NOT NULL,
    sha256 character varying(64) NOT NULL,
    facts json,
    error json,
    created_at timestamp with time zone NOT NULL,
    architecture character varying(300),
    made_by character varying(40)
);


--
-- Name: outbox; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.outbox (
    id integer NOT NULL,
    job_id character varying(40) NOT NULL,
    created_at timestamp with time zone NOT NULL
);


--
-- Name: outbox_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.outbox_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: outbox_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.outbox_id_seq OWNED BY public.outbox.id;


--
-- Name: owners; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.owners (
    name character varying(40) NOT NULL,
    stored_bytes bigint,
    running_jobs bigint,
    queued_jobs bigint,
    requests_per_minute bigint,
    created_at timestamp with time zone NOT NULL
);


--
-- Name: request_windows; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.request_windows (
    owner character varying(40) NOT NULL,
    "window" bigint NOT NULL,
    taken bigint NOT NULL
);


--
-- Name: upload_parts; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.upload_parts (
    upload_id character varying(40) NOT NULL,
    start_bytes bigint NOT NULL,
    size_bytes bigint NOT NULL,
    sha256 character varying(64) NOT NULL
);


--
-- Name: uploads; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.uploads (
    id character varying(40) NOT NULL,
    owner character varying(40) NOT NULL,
    size_bytes bigint NOT NULL,
    offset_bytes bigint NOT NULL,
    description text,
    made character varying(40),
    created_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone NOT NULL
);


--
-- Name: webhooks; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.webhooks (
    id character varying(40) NOT NULL,
    owner character varying(40) NOT NULL,
    url character varying(2048) NOT NULL,
    description character varying(200) NOT NULL,
    events json NOT NULL,
    jobs character varying(10) NOT NULL,
    secret character varying(100) NOT NULL,
    old_secret character varying(100),
    old_secret_until timestamp with time zone,
    disabled_reason character varying(40),
    created_at timestamp with time zone NOT NULL
);


--
-- Name: workers; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.workers (
    id character varying(80) NOT NULL,
    host character varying(255) NOT NULL,
    queue character varying(20) NOT NULL,
    facts json NOT NULL,
    started_at timestamp with time zone NOT NULL,
    seen_at timestamp with time zone NOT NULL
);


--
-- Name: outbox id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.outbox ALTER COLUMN id SET DEFAULT nextval('public.outbox_id_seq'::regclass);


--
-- Data for Name: alembic_version; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.alembic_version (version_num) FROM stdin;
0012
\.


--
-- Data for Name: api_keys; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.api_keys (id, owner, name, scopes, secret_sha256, created_at, expires_at, revoked_at, last_used_at, replaced_by) FROM stdin;
key_pxwrffigvsigk87lr2dw7eenyx	ann	key	["read"]	5b06bab01cef1a68084dd1ec89599037a188933b218a0ae860aa4a7a169ef08f	2026-11-27 03:16:03.043761+00	\N	\N	\N	\N
\.


--
-- Data for Name: artifacts; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.artifacts (id, job_id, owner, name, media_type, size_bytes, sha256, epoch, created_at) FROM stdin;
art_agwcvafc3puv01km5ue93zl6n6	job_3b6dyak9ydccyt6hqwzwcs3bgp	local	model.onnx	application/octet-stream	12	d4ce2c527afe674c7a086bd74e256019e3d5dcdb31eeb6eaadef5ada8c4383b9	1	2026-11-27 03:16:05.153133+00
\.


--
-- Data for Name: audit; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.audit (id, created_at, owner, key_id, action, target, request_id, status, outcome) FROM stdin;
aud_m63dds4ulf0625he6sqb3cb6vb	2026-11-27 03:16:02.094382+00	local	\N	upload_model	mdl_ds9n7lmq3qzvdap6iq3z31pw7y	b7c52476d9a2443aae13dc67851a7f93	201	done
aud_jycug4jd4a4s4lbvccfkqr1bip	2026-11-27 03:16:02.268575+00	local	\N	upload_model	mdl_idq4ot7chj3s4arowwt8topbfm	974d41b2f02a423d9c0cb1c19669cb21	201	done
aud_x1bu6ak7yfbes3362yociiswvc	2026-11-27 03:16:02.468882+00	local	\N	upload_dataset	dst_kxjtm0ffrzrok7dd5c9s7xuxxp	b0866658121a4da8af566e4e25130f0b	201	done
aud_odamk6mwbym4kjexjed2txyspl	2026-11-27 03:16:02.701008+00	local	\N	create_webhook	whk_6mczi3idll6eeg04lln9wr3kbd	721c7bc7564f4e6baa42417506e0e362	201	done
aud_l72nvjiqv8qm6n0k0x80y5uo6b	2026-11-27 03:16:02.955629+00	local	\N	set_quota	local	af15b6be830041d1b804a2ea2f6d1963	200	done
aud_7ihb3re8po8wf65f3hdnx47i51	2026-11-27 03:16:03.077572+00	local	\N	create_key	key_pxwrffigvsigk87lr2dw7eenyx	e375afbdec774c75b893847d3c422a30	201	done
aud_2gq2s95dokkj62os7i0u0b9bpi	2026-11-27 03:16:03.224354+00	local	\N	begin_upload	upl_2m0cumdaxpeqt2xh1q1lmgih0f	5906db15f6fa4b10a8b834973c459d39	201	done
aud_d5xbttxa94q6wg1ems53cbhxgf	2026-11-27 03:16:03.443126+00	local	\N	append_to_upload	upl_2m0cumdaxpeqt2xh1q1lmgih0f	5926881eaa204a66bb72ffdc19a9e089	204	done
aud_ko75z1la1hzlqslbmw00q5o7qp	2026-11-27 03:16:03.730761+00	local	\N	submit_job	job_3b6dyak9ydccyt6hqwzwcs3bgp	9a753124511749bfb270369b73da2540	202	done
aud_kpe7f0s9zsdsoasixew05nax0h	2026-11-27 03:16:03.870862+00	local	\N	submit_job	job_7xdx0eqlwteeftirvbxs2arpn7	ef5f31bcca164bcab1a765c32475d23d	202	done
aud_kmqrk8z5k5oz4d61tz7fwjarxx	2026-11-27 03:16:03.971858+00	local	\N	submit_job	job_335slohzbwhsal7bxjav3qpb7j	690d976514494f47aa7573d16fc980ec	202	done
aud_xcnwrc6jxny8tan740gfg4mmb0	2026-11-27 03:16:04.211496+00	local	\N	submit_job	job_1ni24wkbjdpsr3bw71k2aow3ue	3ef02e0270324143ac16658df1ff3731	202	done
aud_28bxacpk2y09gne2emjp6vqlga	2026-11-27 03:16:04.450735+00	local	\N	submit_job	job_9wysjjs45k05ir3b4um0yguq0z	b397603d293c42aab9c44c8a6712ecd2	202	done
aud_v8j39v4estngrhyz26o65pmpt3	2026-11-27 03:16:04.762067+00	local	\N	submit_distillation	job_9qg7zuql54p26faan4hn2b344w	ca0533c73bb94708be5ea77d7bf08cae	202	done
aud_x6h0836q7rq48rxamyvs45h88m	2026-11-27 03:16:05.565518+00	local	\N	cancel_job	job_335slohzbwhsal7bxjav3qpb7j	b22a0dca4c3646ee88c927e6dba0346b	202	done
\.


--
-- Data for Name: checkpoints; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.checkpoints (job_id, seq, epoch, stage, step, fraction, sha256, size_bytes, created_at) FROM stdin;
job_1ni24wkbjdpsr3bw71k2aow3ue	3	1	finetune	0	0.5	d4ce2c527afe674c7a086bd74e256019e3d5dcdb31eeb6eaadef5ada8c4383b9	12	2026-11-27 03:16:05.813223+00
\.


--
-- Data for Name: datasets; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.datasets (id, owner, name, format, state, size_bytes, sha256, facts, error, created_at) FROM stdin;
dst_kxjtm0ffrzrok7dd5c9s7xuxxp	local	dataset	npz	checking	12	d4ce2c527afe674c7a086bd74e256019e3d5dcdb31eeb6eaadef5ada8c4383b9	\N	\N	2026-11-27 03:16:02.391672+00
dst_1em2snn1am26bsewxtiudkj494	local	upload	npz	ready	10	abababababababababababababababababababababababababababababababab	{"num_rows": 100, "columns": [{"name": "image", "dtype": "uint8", "shape": [3, 8, 8]}, {"name": "label", "dtype": "int64", "shape": []}], "classes": []}	\N	2026-11-27 03:16:04.460102+00
\.


--
-- Data for Name: deliveries; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.deliveries (id, webhook_id, owner, job_id, type, body, state, num_attempts, attempts, due_at, lease_until, created_at, finished_at) FROM stdin;
msg_zgqxb970127dujs2wxsz80vbxn	whk_6mczi3idll6eeg04lln9wr3kbd	local	job_3b6dyak9ydccyt6hqwzwcs3bgp	job.succeeded	{"type":"job.succeeded","timestamp":"2026-11-27T03:16:05.133+00:00","data":{"job_id":"job_3b6dyak9ydccyt6hqwzwcs3bgp","status":"succeeded","attempt":1,"seq":6,"error_code":null,"links":{"self":"/v1/jobs/job_3b6dyak9ydccyt6hqwzwcs3bgp","events":"/v1/jobs/job_3b6dyak9ydccyt6hqwzwcs3bgp/events","metrics":"/v1/jobs/job_3b6dyak9ydccyt6hqwzwcs3bgp/metrics","artifacts":"/v1/jobs/job_3b6dyak9ydccyt6hqwzwcs3bgp/artifacts"}}}	pending	0	[]	2026-11-27 03:16:05.142181+00	\N	2026-11-27 03:16:05.142181+00	\N
msg_jjk8kqk7fw72ncvlakgocr9smd	whk_6mczi3idll6eeg04lln9wr3kbd	local	job_7xdx0eqlwteeftirvbxs2arpn7	job.failed	{"type":"job.failed","timestamp":"2026-11-27T03:16:05.395+00:00","data":{"job_id":"job_7xdx0eqlwteeftirvbxs2arpn7","status":"failed","attempt":1,"seq":6,"error_code":"loss_not_finite","links":{"self":"/v1/jobs/job_7xdx0eqlwteeftirvbxs2arpn7","events":"/v1/jobs/job_7xdx0eqlwteeftirvbxs2arpn7/events","metrics":"/v1/jobs/job_7xdx0eqlwteeftirvbxs2arpn7/metrics","artifacts":"/v1/jobs/job_7xdx0eqlwteeftirvbxs2arpn7/artifacts"}}}	pending	0	[]	2026-11-27 03:16:05.411523+00	\N	2026-11-27 03:16:05.411523+00	\N
\.


--
-- Data for Name: dispatchers; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.dispatchers (id, started_at, seen_at, broker_seen_at) FROM stdin;
\.


--
-- Data for Name: events; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.events (job_id, seq, kind, data, created_at) FROM stdin;
job_y2kfl49zsce7of0bljez04cz6q	1	state	{"state": "queued", "attempt": 0}	2026-11-27 03:16:02.05412+00
job_y2kfl49zsce7of0bljez04cz6q	2	state	{"state": "running", "attempt": 1}	2026-11-27 03:16:02.107781+00
job_y2kfl49zsce7of0bljez04cz6q	3	state	{"state": "succeeded", "attempt": 1}	2026-11-27 03:16:02.147208+00
job_vey190xlk49mx558ooweqcua60	1	state	{"state": "queued", "attempt": 0}	2026-11-27 03:16:02.234312+00
job_vey190xlk49mx558ooweqcua60	2	state	{"state": "running", "attempt": 1}	2026-11-27 03:16:02.291049+00
job_vey190xlk49mx558ooweqcua60	3	state	{"state": "failed", "attempt": 1, "reason": "not_a_program"}	2026-11-27 03:16:02.308841+00
job_c4asb3dca2utrsgzvhj4be3j5t	1	state	{"state": "queued", "attempt": 0}	2026-11-27 03:16:02.408788+00
job_3b6dyak9ydccyt6hqwzwcs3bgp	1	state	{"state": "queued", "attempt": 0}	2026-11-27 03:16:03.598676+00
job_7xdx0eqlwteeftirvbxs2arpn7	1	state	{"state": "queued", "attempt": 0}	2026-11-27 03:16:03.797688+00
job_335slohzbwhsal7bxjav3qpb7j	1	state	{"state": "queued", "attempt": 0}	2026-11-27 03:16:03.92312+00
job_1ni24wkbjdpsr3bw71k2aow3ue	1	state	{"state": "queued", "attempt": 0}	2026-11-27 03:16:04.087268+00
job_9wysjjs45k05ir3b4um0yguq0z	1	state	{"state": "queued", "attempt": 0}	2026-11-27 03:16:04.302003+00
job_9qg7zuql54p26faan4hn2b344w	1	state	{"state": "queued", "attempt": 0}	2026-11-27 03:16:04.545967+00
job_9qg7zuql54p26faan4hn2b344w	2	state	{"state": "running", "attempt": 1}	2026-11-27 03:16:04.659174+00
job_3b6dyak9ydccyt6hqwzwcs3bgp	2	state	{"state": "running", "attempt": 1}	2026-11-27 03:16:04.831885+00
job_3b6dyak9ydccyt6hqwzwcs3bgp	3	progress	{"stage": "finetune", "step": null, "fraction": 0.1, "eta_seconds": null, "message": "", "metrics": {}}	2026-11-27 03:16:04.934163+00
job_3b6dyak9ydccyt6hqwzwcs3bgp	4	progress	{"stage": "finetune", "step": null, "fraction": 0.5, "eta_seconds": null, "message": "", "metrics": {}}	2026-11-27 03:16:04.993181+00
job_3b6dyak9ydccyt6hqwzwcs3bgp	5	progress	{"stage": "finetune", "step": null, "fraction": 0.9, "eta_seconds": null, "message": "", "metrics": {}}	2026-11-27 03:16:05.030359+00
job_3b6dyak9ydccyt6hqwzwcs3bgp	6	state	{"state": "succeeded", "attempt": 1}	2026-11-27 03:16:05.127523+00
job_7xdx0eqlwteeftirvbxs2arpn7	2	state	{"state": "running", "attempt": 1}	2026-11-27 03:16:05.169146+00
job_7xdx0eqlwteeftirvbxs2arpn7	3	progress	{"stage": "finetune", "step": null, "fraction": 0.1, "eta_seconds": null, "message": "", "metrics": {}}	2026-11-27 03:16:05.214827+00
job_7xdx0eqlwteeftirvbxs2arpn7	4	progress	{"stage": "finetune", "step": null, "fraction": 0.5, "eta_seconds": null, "message": "", "metrics": {}}	2026-11-27 03:16:05.261898+00
job_7xdx0eqlwteeftirvbxs2arpn7	5	progress	{"stage": "finetune", "step": null, "fraction": 0.9, "eta_seconds": null, "message": "", "metrics": {}}	2026-11-27 03:16:05.339179+00
job_7xdx0eqlwteeftirvbxs2arpn7	6	state	{"state": "failed", "attempt": 1, "reason": "loss_not_finite"}	2026-11-27 03:16:05.387972+00
job_335slohzbwhsal7bxjav3qpb7j	2	state	{"state": "cancelled", "attempt": 0}	2026-11-27 03:16:05.501598+00
job_1ni24wkbjdpsr3bw71k2aow3ue	2	state	{"state": "running", "attempt": 1}	2026-11-27 03:16:05.628084+00
job_1ni24wkbjdpsr3bw71k2aow3ue	3	checkpoint	{"stage": "finetune", "step": 0, "fraction": 0.5, "size_bytes": 12}	2026-11-27 03:16:05.799963+00
\.


--
-- Data for Name: idempotency_keys; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.idempotency_keys (owner, route, key, fingerprint, status, body, created_at) FROM stdin;
local	POST /v1/jobs	number-0	c9779b941fe8a08a7d3d77d3c5a9672d344e27472464a3b2b9ed27258c077d56	202	{"id":"job_3b6dyak9ydccyt6hqwzwcs3bgp","model_id":"mdl_ds9n7lmq3qzvdap6iq3z31pw7y","status":"queued","stage":null,"progress":{"fraction":0.0,"eta_seconds":null,"message":""},"attempt":0,"max_attempts":3,"checkpoint":null,"resumed_from":null,"error":null,"verdict":null,"isolation":[],"recipe":{"steps":[{"kind":"prune_magnitude","sparsity":0.5,"scope":"global","schedule":"one_shot","num_iterations":5,"training":null,"skip_layers":[]}],"data":null,"target":{"device":"cpu","runtime":"onnxruntime","num_threads":1,"batch_size":1,"num_runs":100},"outputs":{"formats":null},"seed":0},"parent_id":null,"webhook_id":null,"labels":{"n":"0"},"priority":0,"deadline_seconds":21600,"needs":{"device":"cpu","num_devices":0,"memory_bytes":0,"num_threads":1},"waiting":{"reason":"no_worker","detail":"no worker that takes jobs was seen lately; the job waits until one is","fix":"Start a worker; GET /v1/workers lists those that are there."},"num_jobs_ahead":1,"created_at":"2026-11-27T03:16:03.586129Z","started_at":null,"finished_at":null,"links":{"self":"/v1/jobs/job_3b6dyak9ydccyt6hqwzwcs3bgp","events":"/v1/jobs/job_3b6dyak9ydccyt6hqwzwcs3bgp/events","metrics":"/v1/jobs/job_3b6dyak9ydccyt6hqwzwcs3bgp/metrics","artifacts":"/v1/jobs/job_3b6dyak9ydccyt6hqwzwcs3bgp/artifacts","logs":"/v1/jobs/job_3b6dyak9ydccyt6hqwzwcs3bgp/logs","cancel":"/v1/jobs/job_3b6dyak9ydccyt6hqwzwcs3bgp/cancel","model":"/v1/models/mdl_ds9n7lmq3qzvdap6iq3z31pw7y","distillation":null}}	2026-11-27 03:16:03.507262+00
local	POST /v1/jobs	number-1	1aeb9dac08f9bb53d8bb1c16ff5ff0ff64deda29ff6ea7cedfc9afeaaeaf209b	202	{"id":"job_7xdx0eqlwteeftirvbxs2arpn7","model_id":"mdl_ds9n7lmq3qzvdap6iq3z31pw7y","status":"queued","stage":null,"progress":{"fraction":0.0,"eta_seconds":null,"message":""},"attempt":0,"max_attempts":3,"checkpoint":null,"resumed_from":null,"error":null,"verdict":null,"isolation":[],"recipe":{"steps":[{"kind":"prune_magnitude","sparsity":0.5,"scope":"global","schedule":"one_shot","num_iterations":5,"training":null,"skip_layers":[]}],"data":null,"target":{"device":"cpu","runtime":"onnxruntime","num_threads":1,"batch_size":1,"num_runs":100},"outputs":{"formats":null},"seed":0},"parent_id":null,"webhook_id":null,"labels":{"n":"1"},"priority":0,"deadline_seconds":21600,"needs":{"device":"cpu","num_devices":0,"memory_bytes":0,"num_threads":1},"waiting":{"reason":"no_worker","detail":"no worker that takes jobs was seen lately; the job waits until one is","fix":"Start a worker; GET /v1/workers lists those that are there."},"num_jobs_ahead":2,"created_at":"2026-11-27T03:16:03.794140Z","started_at":null,"finished_at":null,"links":{"self":"/v1/jobs/job_7xdx0eqlwteeftirvbxs2arpn7","events":"/v1/jobs/job_7xdx0eqlwteeftirvbxs2arpn7/events","metrics":"/v1/jobs/job_7xdx0eqlwteeftirvbxs2arpn7/metrics","artifacts":"/v1/jobs/job_7xdx0eqlwteeftirvbxs2arpn7/artifacts","logs":"/v1/jobs/job_7xdx0eqlwteeftirvbxs2arpn7/logs","cancel":"/v1/jobs/job_7xdx0eqlwteeftirvbxs2arpn7/cancel","model":"/v1/models/mdl_ds9n7lmq3qzvdap6iq3z31pw7y","distillation":null}}	2026-11-27 03:16:03.74785+00
local	POST /v1/jobs	number-2	4b7f0ee5e3b60eb769849c3abcd219a9602c989bbac75d783a5c60b18637b993	202	{"id":"job_335slohzbwhsal7bxjav3qpb7j","model_id":"mdl_ds9n7lmq3qzvdap6iq3z31pw7y","status":"queued","stage":null,"progress":{"fraction":0.0,"eta_seconds":null,"message":""},"attempt":0,"max_attempts":3,"checkpoint":null,"resumed_from":null,"error":null,"verdict":null,"isolation":[],"recipe":{"steps":[{"kind":"prune_magnitude","sparsity":0.5,"scope":"global","schedule":"one_shot","num_iterations":5,"training":null,"skip_layers":[]}],"data":null,"target":{"device":"cpu","runtime":"onnxruntime","num_threads":1,"batch_size":1,"num_runs":100},"outputs":{"formats":null},"seed":0},"parent_id":null,"webhook_id":null,"labels":{"n":"2"},"priority":0,"deadline_seconds":21600,"needs":{"device":"cpu","num_devices":0,"memory_bytes":0,"num_threads":1},"waiting":{"reason":"no_worker","detail":"no worker that takes jobs was seen lately; the job waits until one is","fix":"Start a worker; GET /v1/workers lists those that are there."},"num_jobs_ahead":3,"created_at":"2026-11-27T03:16:03.922210Z","started_at":null,"finished_at":null,"links":{"self":"/v1/jobs/job_335slohzbwhsal7bxjav3qpb7j","events":"/v1/jobs/job_335slohzbwhsal7bxjav3qpb7j/events","metrics":"/v1/jobs/job_335slohzbwhsal7bxjav3qpb7j/metrics","artifacts":"/v1/jobs/job_335slohzbwhsal7bxjav3qpb7j/artifacts","logs":"/v1/jobs/job_335slohzbwhsal7bxjav3qpb7j/logs","cancel":"/v1/jobs/job_335slohzbwhsal7bxjav3qpb7j/cancel","model":"/v1/models/mdl_ds9n7lmq3qzvdap6iq3z31pw7y","distillation":null}}	2026-11-27 03:16:03.890587+00
local	POST /v1/jobs	number-3	d85a7e1c0370f558e0df5a4896bfa5265914cde82cbc80e65c4a0cdba545fb92	202	{"id":"job_1ni24wkbjdpsr3bw71k2aow3ue","model_id":"mdl_ds9n7lmq3qzvdap6iq3z31pw7y","status":"queued","stage":null,"progress":{"fraction":0.0,"eta_seconds":null,"message":""},"attempt":0,"max_attempts":3,"checkpoint":null,"resumed_from":null,"error":null,"verdict":null,"isolation":[],"recipe":{"steps":[{"kind":"prune_magnitude","sparsity":0.5,"scope":"global","schedule":"one_shot","num_iterations":5,"training":null,"skip_layers":[]}],"data":null,"target":{"device":"cpu","runtime":"onnxruntime","num_threads":1,"batch_size":1,"num_runs":100},"outputs":{"formats":null},"seed":0},"parent_id":null,"webhook_id":null,"labels":{"n":"3"},"priority":0,"deadline_seconds":21600,"needs":{"device":"cpu","num_devices":0,"memory_bytes":0,"num_threads":1},"waiting":{"reason":"no_worker","detail":"no worker that takes jobs was seen lately; the job waits until one is","fix":"Start a worker; GET /v1/workers lists those that are there."},"num_jobs_ahead":4,"created_at":"2026-11-27T03:16:04.047950Z","started_at":null,"finished_at":null,"links":{"self":"/v1/jobs/job_1ni24wkbjdpsr3bw71k2aow3ue","events":"/v1/jobs/job_1ni24wkbjdpsr3bw71k2aow3ue/events","metrics":"/v1/jobs/job_1ni24wkbjdpsr3bw71k2aow3ue/metrics","artifacts":"/v1/jobs/job_1ni24wkbjdpsr3bw71k2aow3ue/artifacts","logs":"/v1/jobs/job_1ni24wkbjdpsr3bw71k2aow3ue/logs","cancel":"/v1/jobs/job_1ni24wkbjdpsr3bw71k2aow3ue/cancel","model":"/v1/models/mdl_ds9n7lmq3qzvdap6iq3z31pw7y","distillation":null}}	2026-11-27 03:16:04.021415+00
local	POST /v1/jobs	number-4	b3e4157b753d64e2a1e5fcde495d679c0b74868cb3d4bb6a7a25a380e5794142	202	{"id":"job_9wysjjs45k05ir3b4um0yguq0z","model_id":"mdl_ds9n7lmq3qzvdap6iq3z31pw7y","status":"queued","stage":null,"progress":{"fraction":0.0,"eta_seconds":null,"message":""},"attempt":0,"max_attempts":3,"checkpoint":null,"resumed_from":null,"error":null,"verdict":null,"isolation":[],"recipe":{"steps":[{"kind":"prune_magnitude","sparsity":0.5,"scope":"global","schedule":"one_shot","num_iterations":5,"training":null,"skip_layers":[]}],"data":null,"target":{"device":"cpu","runtime":"onnxruntime","num_threads":1,"batch_size":1,"num_runs":100},"outputs":{"formats":null},"seed":0},"parent_id":null,"webhook_id":null,"labels":{"n":"4"},"priority":0,"deadline_seconds":21600,"needs":{"device":"cpu","num_devices":0,"memory_bytes":0,"num_threads":1},"waiting":{"reason":"no_worker","detail":"no worker that takes jobs was seen lately; the job waits until one is","fix":"Start a worker; GET /v1/workers lists those that are there."},"num_jobs_ahead":5,"created_at":"2026-11-27T03:16:04.271284Z","started_at":null,"finished_at":null,"links":{"self":"/v1/jobs/job_9wysjjs45k05ir3b4um0yguq0z","events":"/v1/jobs/job_9wysjjs45k05ir3b4um0yguq0z/events","metrics":"/v1/jobs/job_9wysjjs45k05ir3b4um0yguq0z/metrics","artifacts":"/v1/jobs/job_9wysjjs45k05ir3b4um0yguq0z/artifacts","logs":"/v1/jobs/job_9wysjjs45k05ir3b4um0yguq0z/logs","cancel":"/v1/jobs/job_9wysjjs45k05ir3b4um0yguq0z/cancel","model":"/v1/models/mdl_ds9n7lmq3qzvdap6iq3z31pw7y","distillation":null}}	2026-11-27 03:16:04.250779+00
\.


--
-- Data for Name: jobs; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.jobs (id, owner, action, model_id, dataset_id, evaluation_dataset_id, recipe, labels, priority, deadline_seconds, state, attempt, max_attempts, epoch, worker_id, lease_until, published_at, stage, progress, error, metrics, verdict, isolation, last_seq, created_at, started_at, finished_at, resumed_from, needs_device, needs_num_devices, needs_memory_bytes, needs_num_threads, claimed_at, waiting_reason, parent_id, part, webhook_id) FROM stdin;
job_y2kfl49zsce7of0bljez04cz6q	local	check_model	mdl_ds9n7lmq3qzvdap6iq3z31pw7y	\N	\N	\N	{}	100	600	succeeded	1	3	1	hands	\N	2026-11-27 03:16:02.015909+00	claimed	{"fraction": 1.0, "eta_seconds": 0.0, "message": ""}	\N	\N	\N	[]	3	2026-11-27 03:16:02.015909+00	2026-11-27 03:16:02.105769+00	2026-11-27 03:16:02.140033+00	\N	cpu	0	0	1	2026-11-27 03:16:02.105769+00	\N	\N	\N	\N
job_vey190xlk49mx558ooweqcua60	local	check_model	mdl_idq4ot7chj3s4arowwt8topbfm	\N	\N	\N	{}	100	600	failed	1	3	1	hands	\N	2026-11-27 03:16:02.228028+00	claimed	{"fraction": 0.0, "eta_seconds": null, "message": ""}	{"code": "not_a_program", "detail": "the archive has no model.json", "fix": "Export it again.", "retryable": false}	\N	\N	[]	3	2026-11-27 03:16:02.228028+00	2026-11-27 03:16:02.282645+00	2026-11-27 03:16:02.307113+00	\N	cpu	0	0	1	2026-11-27 03:16:02.282645+00	\N	\N	\N	\N
job_c4asb3dca2utrsgzvhj4be3j5t	local	check_dataset	\N	dst_kxjtm0ffrzrok7dd5c9s7xuxxp	\N	\N	{}	100	600	queued	0	3	0	\N	\N	2026-11-27 03:16:02.395798+00	\N	{"fraction": 0.0, "eta_seconds": null, "message": ""}	\N	\N	\N	[]	1	2026-11-27 03:16:02.395798+00	\N	\N	\N	cpu	0	0	1	\N	\N	\N	\N	\N
job_9wysjjs45k05ir3b4um0yguq0z	local	optimize	mdl_ds9n7lmq3qzvdap6iq3z31pw7y	\N	\N	{"steps": [{"kind": "prune_magnitude", "sparsity": 0.5, "scope": "global", "schedule": "one_shot", "num_iterations": 5, "training": null, "skip_layers": []}], "data": null, "target": {"device": "cpu", "runtime": "onnxruntime", "num_threads": 1, "batch_size": 1, "num_runs": 100}, "outputs": {"formats": null}, "seed": 0}	{"n": "4"}	0	21600	queued	0	3	0	\N	\N	2026-11-27 03:16:04.271284+00	\N	{"fraction": 0.0, "eta_seconds": null, "message": ""}	\N	\N	\N	[]	1	2026-11-27 03:16:04.271284+00	\N	\N	\N	cpu	0	0	1	\N	\N	\N	\N	\N
job_7xdx0eqlwteeftirvbxs2arpn7	local	optimize	mdl_ds9n7lmq3qzvdap6iq3z31pw7y	\N	\N	{"steps": [{"kind": "prune_magnitude", "sparsity": 0.5, "scope": "global", "schedule": "one_shot", "num_iterations": 5, "training": null, "skip_layers": []}], "data": null, "target": {"device": "cpu", "runtime": "onnxruntime", "num_threads": 1, "batch_size": 1, "num_runs": 100}, "outputs": {"formats": null}, "seed": 0}	{"n": "1"}	0	21600	failed	1	3	1	hands	\N	2026-11-27 03:16:03.79414+00	finetune	{"stage": "finetune", "step": null, "fraction": 0.9, "eta_seconds": null, "message": "", "metrics": {}}	{"code": "loss_not_finite", "detail": "loss is nan", "fix": "Lower it.", "retryable": false}	\N	\N	[]	6	2026-11-27 03:16:03.79414+00	2026-11-27 03:16:05.168205+00	2026-11-27 03:16:05.374271+00	\N	cpu	0	0	1	2026-11-27 03:16:05.168205+00	\N	\N	\N	\N
job_1ni24wkbjdpsr3bw71k2aow3ue	local	optimize	mdl_ds9n7lmq3qzvdap6iq3z31pw7y	\N	\N	{"steps": [{"kind": "prune_magnitude", "sparsity": 0.5, "scope": "global", "schedule": "one_shot", "num_iterations": 5, "training": null, "skip_layers": []}], "data": null, "target": {"device": "cpu", "runtime": "onnxruntime", "num_threads": 1, "batch_size": 1, "num_runs": 100}, "outputs": {"formats": null}, "seed": 0}	{"n": "3"}	0	21600	running	1	3	1	w1	2026-11-27 03:16:06.610352+00	2026-11-27 03:16:04.04795+00	claimed	{"fraction": 0.0, "eta_seconds": null, "message": ""}	\N	\N	\N	[]	3	2026-11-27 03:16:04.04795+00	2026-11-27 03:16:05.610352+00	\N	\N	cpu	0	0	1	2026-11-27 03:16:05.610352+00	\N	\N	\N	\N
job_3b6dyak9ydccyt6hqwzwcs3bgp	local	optimize	mdl_ds9n7lmq3qzvdap6iq3z31pw7y	\N	\N	{"steps": [{"kind": "prune_magnitude", "sparsity": 0.5, "scope": "global", "schedule": "one_shot", "num_iterations": 5, "training": null, "skip_layers": []}], "data": null, "target": {"device": "cpu", "runtime": "onnxruntime", "num_threads": 1, "batch_size": 1, "num_runs": 100}, "outputs": {"formats": null}, "seed": 0}	{"n": "0"}	0	21600	succeeded	1	3	1	hands	\N	2026-11-27 03:16:03.586129+00	finetune	{"fraction": 1.0, "eta_seconds": 0.0, "message": ""}	\N	{"baseline": {"quality": {"metric": "accuracy", "value": 0.95, "higher_is_better": true, "num_examples": 100, "standard_error": 0.02}, "latency": {"batch_size": 1, "num_threads": 1, "num_runs": 10, "p50_ms": 2.0, "p90_ms": 2.5, "p99_ms": 3.0, "mean_ms": 2.1}, "throughput_per_second": 500.0, "peak_memory_bytes": 1000000, "peak_device_memory_bytes": null, "file_bytes": 4000, "packed_bytes": null, "parameters": 1000, "nonzero_parameters": 1000, "macs": 5000, "uncounted_operators": []}, "result": {"quality": {"metric": "accuracy", "value": 0.95, "higher_is_better": true, "num_examples": 100, "standard_error": 0.02}, "latency": {"batch_size": 1, "num_threads": 1, "num_runs": 10, "p50_ms": 2.0, "p90_ms": 2.5, "p99_ms": 3.0, "mean_ms": 2.1}, "throughput_per_second": 500.0, "peak_memory_bytes": 1000000, "peak_device_memory_bytes": null, "file_bytes": 1000, "packed_bytes": null, "parameters": 400, "nonzero_parameters": 300, "macs": 5000, "uncounted_operators": []}, "comparison": {"latency_ratio": {"value": 0.5, "low": 0.45, "high": 0.56}, "file_ratio": 0.25, "packed_ratio": null, "parameters_ratio": 0.4, "macs_ratio": 0.5, "peak_memory_ratio": 1.0, "peak_device_memory_ratio": null, "quality_change": 0.0, "equivalence": [{"output": "output", "cosine": 0.999, "snr_db": 30.5, "max_abs_error": 0.1, "num_examples": 100}]}, "steps": [], "layers": [], "sensitivity": [], "verdict": {"outcome": "better", "summary": "half the time", "better": ["file: 4000 -> 1000 bytes"], "worse": [], "within_noise": [], "warnings": []}, "environment": {"processor": "p", "num_cores": 2, "runtime": "onnxruntime", "num_threads": 1, "versions": {"torch": "2.13.0"}, "isolation": [], "device": null, "target_device": "cpu"}, "distillation": null}	{"outcome": "better", "summary": "half the time", "better": ["file: 4000 -> 1000 bytes"], "worse": [], "within_noise": [], "warnings": []}	["bubblewrap"]	6	2026-11-27 03:16:03.586129+00	2026-11-27 03:16:04.814306+00	2026-11-27 03:16:05.120818+00	\N	cpu	0	0	1	2026-11-27 03:16:04.814306+00	\N	\N	\N	\N
job_335slohzbwhsal7bxjav3qpb7j	local	optimize	mdl_ds9n7lmq3qzvdap6iq3z31pw7y	\N	\N	{"steps": [{"kind": "prune_magnitude", "sparsity": 0.5, "scope": "global", "schedule": "one_shot", "num_iterations": 5, "training": null, "skip_layers": []}], "data": null, "target": {"device": "cpu", "runtime": "onnxruntime", "num_threads": 1, "batch_size": 1, "num_runs": 100}, "outputs": {"formats": null}, "seed": 0}	{"n": "2"}	0	21600	cancelled	0	3	0	\N	\N	2026-11-27 03:16:03.92221+00	\N	{"fraction": 0.0, "eta_seconds": null, "message": ""}	\N	\N	\N	[]	2	2026-11-27 03:16:03.92221+00	\N	2026-11-27 03:16:05.492349+00	\N	cpu	0	0	1	\N	\N	\N	\N	\N
job_9qg7zuql54p26faan4hn2b344w	local	distill	mdl_1tjw6ql4l697lll3ujdwu9b66v	dst_1em2snn1am26bsewxtiudkj494	\N	{"teacher_training": {"epochs": 2, "max_steps": null, "batch_size": 64, "accumulate": 1, "optimizer": "adamw", "learning_rate": 0.001, "momentum": 0.9, "weight_decay": 0.0001, "schedule": "cosine", "warmup_fraction": 0.05, "gradient_clip_norm": 1.0, "label_smoothing": 0.0, "precision": "fp32", "augmentations": [], "keep_best": true, "patience": null, "parallel": null, "kind": "finetune"}, "student": {"kind": "derive_student", "width": 0.5, "depth": 1.0, "criterion": "group_norm", "round_to": 4}, "training": {"epochs": 9, "max_steps": null, "batch_size": 64, "accumulate": 1, "optimizer": "adamw", "learning_rate": 0.001, "momentum": 0.9, "weight_decay": 0.0001, "schedule": "cosine", "warmup_fraction": 0.05, "gradient_clip_norm": 1.0, "label_smoothing": 0.0, "precision": "fp32", "augmentations": [], "keep_best": true, "patience": null, "parallel": null, "kind": "distill", "teacher_model_id": null, "temperature": 4.0, "soft_weight": 0.9, "label_weight": 0.1, "hidden_weight": 0.0, "attention_weight": 0.0, "pairs": []}, "tuning": null, "data": {"dataset_id": "dst_1em2snn1am26bsewxtiudkj494", "evaluation_dataset_id": null, "inputs": {"x": {"column": "image", "layout": "as_is", "scale": 0.5, "mean": [], "std": [], "resize": null, "tokens": null, "max_tokens": null}}, "label_column": "label", "task": "classification", "output": null, "evaluation_fraction": 0.2, "split_column": null, "training_split": "train", "evaluation_split": "test", "max_evaluation_examples": 5000}, "target": {"device": "cpu", "runtime": "onnxruntime", "num_threads": 1, "batch_size": 1, "num_runs": 100}, "outputs": {"formats": null}, "seed": 0}	{}	0	21600	running	1	1	0	\N	\N	\N	\N	{"fraction": 0.0, "eta_seconds": null, "message": ""}	\N	\N	\N	[]	2	2026-11-27 03:16:04.541627+00	2026-11-27 03:16:04.640749+00	\N	\N	cpu	0	0	1	\N	\N	\N	\N	\N
\.


--
-- Data for Name: logs; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.logs (job_id, attempt, size_bytes, sha256, created_at) FROM stdin;
job_3b6dyak9ydccyt6hqwzwcs3bgp	1	8	755f78019e2c8d121a7cad3ab1e149f3b5d4f5367d6438cea819781b4bd29495	2026-11-27 03:16:05.162509+00
job_7xdx0eqlwteeftirvbxs2arpn7	1	8	755f78019e2c8d121a7cad3ab1e149f3b5d4f5367d6438cea819781b4bd29495	2026-11-27 03:16:05.41269+00
\.


--
-- Data for Name: models; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.models (id, owner, name, format, state, size_bytes, sha256, facts, error, created_at, architecture, made_by) FROM stdin;
mdl_nkh1a7rftdn6o83yiam3om184t	local	upload	pt2	ready	10	abababababababababababababababababababababababababababababababab	{"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 8, 8]}], "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}], "dynamic_batch": true, "batch_size": null, "exported_in": "eval", "parameters": 100, "buffers": 0, "parameter_bytes": 400, "macs": 1000, "uncounted_operators": [], "layers": [{"name": "conv", "type": "Conv2d", "shape": [8, 3, 3, 3], "parameters": 216, "macs": 1}, {"name": "head", "type": "Linear", "shape": [10, 8], "parameters": 80, "macs": 1}], "tied": [], "tokenizer": false, "capabilities": [{"kind": "prune_structured", "applicable": true, "layers": ["conv"], "missing": null}, {"kind": "prune_magnitude", "applicable": true, "layers": ["conv", "head"], "missing": null}], "warnings": []}	\N	2026-11-27 03:16:01.788837+00	\N	\N
mdl_ds9n7lmq3qzvdap6iq3z31pw7y	local	uploaded	pt2	ready	12	d4ce2c527afe674c7a086bd74e256019e3d5dcdb31eeb6eaadef5ada8c4383b9	{"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3]}], "outputs": [{"name": "output", "dtype": "float32", "shape": ["batch", 2]}], "dynamic_batch": true, "batch_size": null, "exported_in": "eval", "parameters": 8, "buffers": 0, "parameter_bytes": 32, "macs": 6, "uncounted_operators": [], "layers": [], "tied": [], "tokenizer": false, "capabilities": [], "warnings": []}	\N	2026-11-27 03:16:01.943526+00	\N	\N
mdl_idq4ot7chj3s4arowwt8topbfm	local	model	pt2	rejected	8	f62c7d17e241fe5c5c0c64d2e32ab6e3bd10547a9c02977cc126acc0fe6e6554	\N	{"code": "not_a_program", "detail": "the archive has no model.json", "fix": "Export it again.", "retryable": false}	2026-11-27 03:16:02.198389+00	\N	\N
mdl_1tjw6ql4l697lll3ujdwu9b66v	local	upload	pt2	ready	10	abababababababababababababababababababababababababababababababab	{"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 8, 8]}], "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}], "dynamic_batch": true, "batch_size": null, "exported_in": "eval", "parameters": 100, "buffers": 0, "parameter_bytes": 400, "macs": 1000, "uncounted_operators": [], "layers": [{"name": "conv", "type": "Conv2d", "shape": [8, 3, 3, 3], "parameters": 216, "macs": 1}, {"name": "head", "type": "Linear", "shape": [10, 8], "parameters": 80, "macs": 1}], "tied": [], "tokenizer": false, "capabilities": [{"kind": "prune_structured", "applicable": true, "layers": ["conv"], "missing": null}, {"kind": "prune_magnitude", "applicable": true, "layers": ["conv", "head"], "missing": null}], "warnings": []}	\N	2026-11-27 03:16:04.458402+00	\N	\N
\.


--
-- Data for Name: outbox; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.outbox (id, job_id, created_at) FROM stdin;
1	job_y2kfl49zsce7of0bljez04cz6q	2026-11-27 03:16:02.062145+00
2	job_vey190xlk49mx558ooweqcua60	2026-11-27 03:16:02.236434+00
3	job_c4asb3dca2utrsgzvhj4be3j5t	2026-11-27 03:16:02.412802+00
4	job_3b6dyak9ydccyt6hqwzwcs3bgp	2026-11-27 03:16:03.619072+00
5	job_7xdx0eqlwteeftirvbxs2arpn7	2026-11-27 03:16:03.799984+00
6	job_335slohzbwhsal7bxjav3qpb7j	2026-11-27 03:16:03.923731+00
7	job_1ni24wkbjdpsr3bw71k2aow3ue	2026-11-27 03:16:04.090591+00
8	job_9wysjjs45k05ir3b4um0yguq0z	2026-11-27 03:16:04.30327+00
\.


--
-- Data for Name: owners; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.owners (name, stored_bytes, running_jobs, queued_jobs, requests_per_minute, created_at) FROM stdin;
local	\N	\N	100	\N	2026-11-27 03:16:01.954162+00
ann	\N	\N	\N	\N	2026-11-27 03:16:03.03304+00
\.


--
-- Data for Name: request_windows; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.request_windows (owner, "window", taken) FROM stdin;
local	29929156	600
\.


--
-- Data for Name: upload_parts; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.upload_parts (upload_id, start_bytes, size_bytes, sha256) FROM stdin;
upl_2m0cumdaxpeqt2xh1q1lmgih0f	0	12	d4ce2c527afe674c7a086bd74e256019e3d5dcdb31eeb6eaadef5ada8c4383b9
\.


--
-- Data for Name: uploads; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.uploads (id, owner, size_bytes, offset_bytes, description, made, created_at, expires_at) FROM stdin;
upl_2m0cumdaxpeqt2xh1q1lmgih0f	local	20	12	\N	\N	2026-11-27 03:16:03.146158+00	2026-11-28 03:16:03.366406+00
\.


--
-- Data for Name: webhooks; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.webhooks (id, owner, url, description, events, jobs, secret, old_secret, old_secret_until, disabled_reason, created_at) FROM stdin;
whk_6mczi3idll6eeg04lln9wr3kbd	local	https://8.8.8.8/hook		["job.succeeded", "job.failed"]	all	whsec_MTGF5/RsdgRHBIDqpPLI6+5nzecc6KdG9+WWOAyNly8=	\N	\N	\N	2026-11-27 03:16:02.656758+00
\.


--
-- Data for Name: workers; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.workers (id, host, queue, facts, started_at, seen_at) FROM stdin;
\.


--
-- Name: outbox_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.outbox_id_seq', 8, true);


--
-- Name: alembic_version alembic_version_pkc; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);


--
-- Name: api_keys pk_api_keys; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT pk_api_keys PRIMARY KEY (id);


--
-- Name: artifacts pk_artifacts; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.artifacts
    ADD CONSTRAINT pk_artifacts PRIMARY KEY (id);


--
-- Name: audit pk_audit; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.audit
    ADD CONSTRAINT pk_audit PRIMARY KEY (id);


--
-- Name: checkpoints pk_checkpoints; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.checkpoints
    ADD CONSTRAINT pk_checkpoints PRIMARY KEY (job_id, seq);


--
-- Name: datasets pk_datasets; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.datasets
    ADD CONSTRAINT pk_datasets PRIMARY KEY (id);


--
-- Name: deliveries pk_deliveries; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.deliveries
    ADD CONSTRAINT pk_deliveries PRIMARY KEY (id);


--
-- Name: dispatchers pk_dispatchers; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.dispatchers
    ADD CONSTRAINT pk_dispatchers PRIMARY KEY (id);


--
-- Name: events pk_events; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.events
    ADD CONSTRAINT pk_events PRIMARY KEY (job_id, seq);


--
-- Name: idempotency_keys pk_idempotency_keys; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT pk_idempotency_keys PRIMARY KEY (owner, route, key);


--
-- Name: jobs pk_jobs; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT pk_jobs PRIMARY KEY (id);


--
-- Name: logs pk_logs; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.logs
    ADD CONSTRAINT pk_logs PRIMARY KEY (job_id, attempt);


--
-- Name: models pk_models; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.models
    ADD CONSTRAINT pk_models PRIMARY KEY (id);


--
-- Name: outbox pk_outbox; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.outbox
    ADD CONSTRAINT pk_outbox PRIMARY KEY (id);


--
-- Name: owners pk_owners; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.owners
    ADD CONSTRAINT pk_owners PRIMARY KEY (name);


--
-- Name: request_windows pk_request_windows; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.request_windows
    ADD CONSTRAINT pk_request_windows PRIMARY KEY (owner);


--
-- Name: upload_parts pk_upload_parts; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.upload_parts
    ADD CONSTRAINT pk_upload_parts PRIMARY KEY (upload_id, start_bytes);


--
-- Name: uploads pk_uploads; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.uploads
    ADD CONSTRAINT pk_uploads PRIMARY KEY (id);


--
-- Name: webhooks pk_webhooks; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.webhooks
    ADD CONSTRAINT pk_webhooks PRIMARY KEY (id);


--
-- Name: workers pk_workers; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.workers
    ADD CONSTRAINT pk_workers PRIMARY KEY (id);


--
-- Name: artifacts uq_artifacts_job_id; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.artifacts
    ADD CONSTRAINT uq_artifacts_job_id UNIQUE (job_id, name);


--
-- Name: jobs uq_jobs_parent_id; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT uq_jobs_parent_id UNIQUE (parent_id, part);


--
-- Name: ix_api_keys_created; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_api_keys_created ON public.api_keys USING btree (created_at, id);


--
-- Name: ix_api_keys_owner; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_api_keys_owner ON public.api_keys USING btree (owner);


--
-- Name: ix_artifacts_job_id; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_artifacts_job_id ON public.artifacts USING btree (job_id);


--
-- Name: ix_artifacts_owner; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_artifacts_owner ON public.artifacts USING btree (owner);


--
-- Name: ix_artifacts_sha256; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_artifacts_sha256 ON public.artifacts USING btree (sha256);


--
-- Name: ix_audit_created; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_audit_created ON public.audit USING btree (created_at, id);


--
-- Name: ix_audit_owner; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_audit_owner ON public.audit USING btree (owner);


--
-- Name: ix_datasets_created; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_datasets_created ON public.datasets USING btree (created_at, id);


--
-- Name: ix_datasets_owner; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_datasets_owner ON public.datasets USING btree (owner);


--
-- Name: ix_datasets_sha256; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_datasets_sha256 ON public.datasets USING btree (sha256);


--
-- Name: ix_deliveries_state_due; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_deliveries_state_due ON public.deliveries USING btree (state, due_at);


--
-- Name: ix_deliveries_webhook_created; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_deliveries_webhook_created ON public.deliveries USING btree (webhook_id, created_at, id);


--
-- Name: ix_jobs_created; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_jobs_created ON public.jobs USING btree (created_at, id);


--
-- Name: ix_jobs_dataset_id; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_jobs_dataset_id ON public.jobs USING btree (dataset_id);


--
-- Name: ix_jobs_model_id; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_jobs_model_id ON public.jobs USING btree (model_id);


--
-- Name: ix_jobs_owner; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_jobs_owner ON public.jobs USING btree (owner);


--
-- Name: ix_jobs_owner_claimed; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_jobs_owner_claimed ON public.jobs USING btree (owner, claimed_at);


--
-- Name: ix_jobs_state_lease; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_jobs_state_lease ON public.jobs USING btree (state, lease_until);


--
-- Name: ix_jobs_state_published; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_jobs_state_published ON public.jobs USING btree (state, published_at);


--
-- Name: ix_jobs_waiting; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_jobs_waiting ON public.jobs USING btree (state, needs_device, priority, owner, created_at, id, needs_num_devices, needs_memory_bytes, needs_num_threads);


--
-- Name: ix_logs_sha256; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_logs_sha256 ON public.logs USING btree (sha256);


--
-- Name: ix_models_created; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_models_created ON public.models USING btree (created_at, id);


--
-- Name: ix_models_made_by; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_models_made_by ON public.models USING btree (made_by);


--
-- Name: ix_models_owner; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_models_owner ON public.models USING btree (owner);


--
-- Name: ix_models_sha256; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_models_sha256 ON public.models USING btree (sha256);


--
-- Name: ix_uploads_expires_at; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_uploads_expires_at ON public.uploads USING btree (expires_at);


--
-- Name: ix_uploads_owner; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_uploads_owner ON public.uploads USING btree (owner);


--
-- Name: ix_webhooks_owner_created; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX ix_webhooks_owner_created ON public.webhooks USING btree (owner, created_at, id);


--
-- Name: artifacts fk_artifacts_job_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.artifacts
    ADD CONSTRAINT fk_artifacts_job_id FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;


--
-- Name: checkpoints fk_checkpoints_job_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.checkpoints
    ADD CONSTRAINT fk_checkpoints_job_id FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;


--
-- Name: deliveries fk_deliveries_webhook_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.deliveries
    ADD CONSTRAINT fk_deliveries_webhook_id FOREIGN KEY (webhook_id) REFERENCES public.webhooks(id) ON DELETE CASCADE;


--
-- Name: events fk_events_job_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.events
    ADD CONSTRAINT fk_events_job_id FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;


--
-- Name: jobs fk_jobs_dataset_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT fk_jobs_dataset_id FOREIGN KEY (dataset_id) REFERENCES public.datasets(id);


--
-- Name: jobs fk_jobs_evaluation_dataset_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT fk_jobs_evaluation_dataset_id FOREIGN KEY (evaluation_dataset_id) REFERENCES public.datasets(id);


--
-- Name: jobs fk_jobs_model_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT fk_jobs_model_id FOREIGN KEY (model_id) REFERENCES public.models(id);


--
-- Name: jobs fk_jobs_parent_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT fk_jobs_parent_id FOREIGN KEY (parent_id) REFERENCES public.jobs(id) ON DELETE CASCADE;


--
-- Name: jobs fk_jobs_webhook_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT fk_jobs_webhook_id FOREIGN KEY (webhook_id) REFERENCES public.webhooks(id) ON DELETE SET NULL;


--
-- Name: logs fk_logs_job_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.logs
    ADD CONSTRAINT fk_logs_job_id FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;


--
-- Name: outbox fk_outbox_job_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.outbox
    ADD CONSTRAINT fk_outbox_job_id FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;


--
-- Name: upload_parts fk_upload_parts_upload_id; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.upload_parts
    ADD CONSTRAINT fk_upload_parts_upload_id FOREIGN KEY (upload_id) REFERENCES public.uploads(id) ON DELETE CASCADE;


--
-- PostgreSQL database dump complete
--

\unrestrict 9VKv6M6iTb564FQbKdSiQTVmj5uBCLgx4PJ6n59FS100R99UJiQNprmPDIYefMh

